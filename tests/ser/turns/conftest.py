"""Speech that is made on the spot, by espeak-ng."""

import numpy as np
import numpy.typing as npt
import pytest

from tests.spoken_calls import have_voices, say


@pytest.fixture(scope="session")
def spoken() -> npt.NDArray[np.float32]:
    """Some six seconds of speech at 16 kHz, without the silence around it."""
    if not have_voices():
        pytest.skip("espeak-ng is not installed")
    return say("Good morning, this is a call about your invoice. I have read it twice, and do not understand it.", "en")
