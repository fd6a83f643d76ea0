"""RedisStore: how it connects, what it writes to Redis, and that its messages show no secret."""

import subprocess
import sys
from pathlib import Path

import pytest

redis = pytest.importorskip("redis")

from mal_adapter import MemoryState  # noqa: E402
from mal_adapter.errors import ConfigError, StateFormatError, StoreError  # noqa: E402
from mal_adapter.stores import RedisStore  # noqa: E402
from tests.stores.servers import PASSWORD, RedisServer  # noqa: E402
from tests.stores.states import state_of  # noqa: E402


@pytest.fixture
def client(server: RedisServer):
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
        yield client


def places(server: RedisServer) -> dict[str, str]:
    return {
        "tcp": server.url,
        "tls": f"rediss://:{PASSWORD}@127.0.0.1:{server.tls_port}?ssl_ca_certs={server.certificate}",
        "unix": f"unix://:{PASSWORD}@{server.socket}",
    }


@pytest.mark.parametrize("kind", ["tcp", "tls", "unix"])
def test_every_kind_of_url_reaches_the_same_sessions(kind: str, server: RedisServer, client):
    store = RedisStore(places(server)[kind])
    version = store.put(kind, state_of(1))
    assert RedisStore(client).get(kind).version == version
    assert list(store) == [kind]
    assert PASSWORD not in repr(store)
    assert repr(store).startswith(f"RedisStore('{places(server)[kind].partition(':')[0]}://")


def test_tls_does_not_trust_an_unknown_certificate(server: RedisServer):
    store = RedisStore(f"rediss://:{PASSWORD}@127.0.0.1:{server.tls_port}")
    with pytest.raises(StoreError, match=r"(?i)certificate.*TLS"):
        store.get("call")


def test_the_value_is_a_state_file(server: RedisServer, client, tmp_path: Path):
    store = RedisStore(server.url)
    store.put("call/1", state_of(3))
    (tmp_path / "state").write_bytes(client.get("mal_adapter:call/1"))
    assert MemoryState.load(tmp_path / "state").equals(state_of(3))
    client.set("mal_adapter:call/2", state_of(4).to_bytes())
    assert store.get("call/2").state.equals(state_of(4))


def test_a_ttl_is_the_servers(server: RedisServer, client):
    RedisStore(server.url, ttl_s=60).put("call", state_of(1))
    assert 50_000 < client.pttl("mal_adapter:call") <= 60_000
    store = RedisStore(server.url)
    store.put("call", state_of(2), store.get("call").version)
    assert client.pttl("mal_adapter:call") == -1


@pytest.mark.parametrize("prefix", ["a*", "a?", "[ab]", "a\\", "", "ä:"])
def test_a_prefix_is_taken_literally(prefix: str, server: RedisServer, client):
    others = ["ab", "aXb", "a", "b:c", "a\\\\", "A*call"]
    for key in others:
        client.set(key, b"not ours")
    store = RedisStore(server.url, prefix)
    store.put("call", state_of(1))
    assert set(store) == {key[len(prefix) :] for key in others if key.startswith(prefix)} | {"call"}


def test_keys_that_are_no_sessions_do_not_disturb_listing(server: RedisServer, client):
    client.set(b"mal_adapter:\xff\xfe", b"")
    client.set("mal_adapter:", b"")
    store = RedisStore(server.url)
    store.put("call", state_of(1))
    assert list(store) == ["call"]


def test_many_sessions_are_listed_once_each(server: RedisServer, client):
    for i in range(3000):
        client.set(f"mal_adapter:{i}", b"")
    assert sorted(map(int, RedisStore(server.url))) == list(range(3000))


def test_a_value_that_is_no_state_is_named(server: RedisServer, client):
    store = RedisStore(server.url)
    client.set("mal_adapter:call", b"hello")
    with pytest.raises(StateFormatError, match=r"mal_adapter:call.*drop"):
        store.get("call")
    client.lpush("mal_adapter:list", "hello")
    with pytest.raises(StoreError, match=r"can't read sessions in redis://127.0.0.1.*WRONGTYPE"):
        store.get("list")
    assert store.drop("call")
    assert store.drop("list")


def test_a_put_is_one_round_trip(server: RedisServer, client):
    store = RedisStore(server.url)
    version = store.put("call", state_of(1))
    client.config_resetstat()
    store.put("call", state_of(2), version)
    stats = {name for name in client.info("commandstats") if name not in ("cmdstat_config|resetstat", "cmdstat_info")}
    assert stats == {"cmdstat_evalsha", "cmdstat_get", "cmdstat_set"}  # the latter two within the script
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] == 1


@pytest.mark.parametrize("url", ["redis://:pa/ss0rd@host", "redis://host:port", "redis://h?db=x", "http://:pa@h", "h"])
def test_a_url_that_cannot_be_understood_is_refused_without_telling_it(url: str):
    with pytest.raises(ConfigError, match="rediss://") as caught:
        RedisStore(url)
    assert "pa" not in str(caught.value).replace("password", "")
    assert caught.value.__suppress_context__


def test_a_url_may_set_its_own_timeouts():
    options = RedisStore("redis://host?socket_timeout=1.5")._client.connection_pool.connection_kwargs
    assert (options["socket_timeout"], options["socket_connect_timeout"]) == (1.5, 5.0)


def test_a_client_that_decodes_is_refused():
    with pytest.raises(ConfigError, match="decode_responses=False"):
        RedisStore(redis.Redis(decode_responses=True))
    with pytest.raises(ConfigError, match="decode_responses=False"):
        RedisStore("redis://host?decode_responses=1")


def test_redis_is_imported_when_it_is_used_and_named_when_it_is_missing():
    code = """
import sys
from mal_adapter.stores import open_store
assert "redis" not in sys.modules
sys.modules["redis"] = None  # as if it were not installed
open_store("redis://host")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MissingDependencyError" in done.stderr
    assert "pip install 'mal-adapter[redis]'" in done.stderr
