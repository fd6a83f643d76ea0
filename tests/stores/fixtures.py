"""Each kind of store, empty; Redis is a real server, one for the whole run."""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mal_adapter.stores import FolderStore, InMemoryStore, RedisStore, SessionStore
from tests.stores.servers import RedisServer

_prefixes = (f"test-{i}:" for i in itertools.count())


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path leaves room for a unix socket's, as pytest's own may not."""
    with tempfile.TemporaryDirectory(prefix="mal") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def server() -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory(prefix="mal") as folder:
        server = RedisServer(Path(folder), "--save", "", tls=True).start()
        yield server
        server.kill()


@pytest.fixture(scope="session", params=["memory", "folder", "redis"])
def make_store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SessionStore]:
    """Makes a new, empty store of one kind."""
    if request.param == "memory":
        return InMemoryStore
    if request.param == "folder":
        return lambda **options: FolderStore(tmp_path_factory.mktemp("sessions"), **options)
    server = request.getfixturevalue("server")
    return lambda **options: RedisStore(server.url, next(_prefixes), **options)
