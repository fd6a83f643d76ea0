"""A Redis that is away, full, hanging, read-only or locked: a StoreError that helps, and no secret in it."""

import contextlib
import itertools
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

redis = pytest.importorskip("redis")

from mal_adapter.errors import StoreError  # noqa: E402
from mal_adapter.stores import RedisStore  # noqa: E402
from tests.stores.servers import PASSWORD, RedisServer  # noqa: E402
from tests.stores.states import state_of  # noqa: E402

DURABLE = ("--appendonly", "yes", "--appendfsync", "always", "--save", "")


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


@pytest.fixture
def own_server(request: pytest.FixtureRequest, short_path: Path) -> Iterator[RedisServer]:
    """One that a test may stop, with the options it is parametrised with."""
    server = RedisServer(short_path, *getattr(request, "param", ("--save", ""))).start()
    yield server
    server.kill()


@pytest.mark.parametrize("own_server", [DURABLE, ("--save", "")], ids=["durable", "empty"], indirect=True)
def test_the_same_store_works_again_when_redis_is_back(own_server: RedisServer, request: pytest.FixtureRequest):
    store = RedisStore(own_server.url)
    version = store.put("call", state_of(1))
    own_server.kill()
    for access in (
        lambda: store.get("call"),
        lambda: store.put("call", state_of(2), version),
        lambda: store.drop("call"),
        lambda: list(store),
    ):
        with at_most(3), pytest.raises(StoreError, match=r"127\.0\.0\.1.*check that Redis runs there") as caught:
            access()
        assert PASSWORD not in "".join(traceback.format_exception(caught.value))
    own_server.start()
    if "durable" in request.node.name:
        assert store.get("call").state.equals(state_of(1))
    else:
        assert store.get("call") is None
    store.put("call", state_of(2), version)
    assert store.get("call").state.equals(state_of(2))


@pytest.mark.parametrize("own_server", [DURABLE], ids=["durable"], indirect=True)
def test_a_redis_killed_amid_puts_has_the_old_state_or_the_new(own_server: RedisServer):
    store = RedisStore(own_server.url)
    store.put("call", state_of(0))
    confirmed = 0

    def put_until_it_fails() -> None:
        nonlocal confirmed
        stored = store.get("call")
        confirmed, version = int(stored.state.utterances), stored.version
        with contextlib.suppress(StoreError):
            for n in itertools.count(confirmed + 1):
                version = store.put("call", state_of(n), version)
                confirmed = n

    for i in range(10):
        writer = threading.Thread(target=put_until_it_fails)
        writer.start()
        time.sleep(0.05 + 0.003 * i)
        own_server.kill()
        writer.join()
        own_server.start()
        reached = int(store.get("call").state.utterances)
        assert confirmed <= reached <= confirmed + 1
        assert store.get("call").state.equals(state_of(reached))
    print(f"10 kills of Redis in {confirmed} puts")


def test_a_redis_that_hangs_is_waited_for_no_longer_than_asked(own_server: RedisServer):
    store = RedisStore(own_server.url + "?socket_timeout=0.5")
    version = store.put("call", state_of(1))
    own_server._process.send_signal(signal.SIGSTOP)
    with at_most(2), pytest.raises(StoreError, match=r"(?i)timeout"):
        store.get("call")
    with at_most(2), pytest.raises(StoreError, match=r"(?i)timeout"):
        store.put("call", state_of(2), version)
    own_server._process.send_signal(signal.SIGCONT)
    assert store.get("call").state.equals(state_of(2)) or store.get("call").state.equals(state_of(1))
    assert store.put("new", state_of(3))
    assert store.get("new").state.equals(state_of(3))


def test_a_full_redis_is_a_store_error_and_the_old_state_stays(own_server: RedisServer):
    store = RedisStore(own_server.url)
    version = store.put("call", state_of(1))
    with redis.Redis.from_url(own_server.url) as client:
        client.config_set("maxmemory", 1)
        with pytest.raises(StoreError, match=r"can't write.*memory.*raise Redis's maxmemory"):
            store.put("call", state_of(2), version)
        assert store.get("call").state.equals(state_of(1))
        client.config_set("maxmemory", 0)
    store.put("call", state_of(2), version)


def test_a_replica_is_a_store_error_that_names_the_primary(own_server: RedisServer):
    store = RedisStore(own_server.url)
    version = store.put("call", state_of(1))
    with redis.Redis.from_url(own_server.url) as client:
        client.replicaof("127.0.0.1", 1)
        with pytest.raises(StoreError, match="connect to the primary"):
            store.put("call", state_of(2), version)
        assert store.get("call").state.equals(state_of(1))
        client.replicaof("NO", "ONE")
    store.put("call", state_of(2), version)


@pytest.mark.parametrize("login", [":wr0ng@", "user:wr0ng@", ""], ids=["wrong", "unknown user", "none"])
def test_a_wrong_password_is_a_store_error_without_it(login: str, server: RedisServer):
    store = RedisStore(f"redis://{login}127.0.0.1:{server.port}")
    with pytest.raises(StoreError, match="check the user, the password") as caught:
        store.get("call")
    assert "wr0ng" not in "".join(traceback.format_exception(caught.value)) + repr(store)


@pytest.mark.parametrize(
    "url", ["redis://nowhere.invalid", "redis://a..b", "unix:///nowhere.sock", "rediss://127.0.0.1:1?ssl_ca_certs=/no"]
)
def test_a_place_that_is_not_there_is_a_store_error(url: str):
    with at_most(10), pytest.raises(StoreError, match="can't read sessions in"):
        RedisStore(url).get("call")


def test_a_fork_of_a_process_that_has_used_a_store_has_connections_of_its_own(server: RedisServer):
    store = RedisStore(server.url, "fork:")
    store.put("call", state_of(1))
    child = os.fork()
    if child == 0:
        os._exit(0 if all(store.get("call").state.equals(state_of(1)) for _ in range(100)) else 1)
    assert all(store.get("call").state.equals(state_of(1)) for _ in range(100))
    assert os.waitpid(child, 0)[1] == 0
