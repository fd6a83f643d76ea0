"""Every test with the argument `host` runs on every family."""

import pytest

from tests.hosts.builders import HOSTS, TinyHost


@pytest.fixture(params=HOSTS.values(), ids=HOSTS.keys())
def host(request: pytest.FixtureRequest) -> TinyHost:
    return request.param
