"""In this folder the package takes the kernels on the CPU as well, interpreted."""

from collections.abc import Iterator

import pytest

from tests.memory.fused.interpreter import INTERPRETED, VARIABLE


@pytest.fixture(scope="module", autouse=True)
def _kernels_on_the_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            patch.setenv(VARIABLE, "1")
        yield
