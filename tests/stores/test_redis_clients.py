"""Clients of every kind that redis-py has: a store works with them, or refuses them when it is made."""

import contextlib
import tempfile
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

redis = pytest.importorskip("redis")

from redis.backoff import NoBackoff  # noqa: E402
from redis.credentials import CredentialProvider, UsernamePasswordCredentialProvider  # noqa: E402
from redis.retry import Retry  # noqa: E402

from mal_adapter.errors import ConfigError, SessionConflictError, StoreError  # noqa: E402
from mal_adapter.stores import RedisStore, open_store  # noqa: E402
from tests.stores.servers import (  # noqa: E402
    PASSWORD,
    Proxy,
    RedisCluster,
    RedisServer,
    Sentinel,
    free_port,
    running,
    wait_until,
)
from tests.stores.states import count_up, state_of  # noqa: E402

IDS = ["call-1", "tenant/call-1", "{tenant}call-1", "{tenant}call-2", "a}b{c", "{}", "é ü", *map(str, range(30))]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    with tempfile.TemporaryDirectory(prefix="mal") as folder:
        cluster = RedisCluster(Path(folder))
        with running(cluster):
            yield cluster


@pytest.fixture
def watched(short_path: Path) -> Iterator[tuple[RedisServer, Sentinel]]:
    """A server, and the sentinel that names it."""
    server = RedisServer(short_path, "--save", "")
    sentinel = Sentinel(short_path, server)
    with running(server, sentinel):
        yield server, sentinel


def cluster_client(cluster: RedisCluster, **options: Any) -> Any:
    return redis.cluster.RedisCluster.from_url(cluster.url, **options)


def keep_all(store: RedisStore) -> None:
    """What a store is for, once with every id."""
    versions = {session_id: store.put(session_id, state_of(i)) for i, session_id in enumerate(IDS)}
    assert sorted(store) == sorted(IDS)
    for i, session_id in enumerate(IDS):
        assert store.get(session_id).state.equals(state_of(i))
        store.put(session_id, state_of(i + 1), versions[session_id])
        with pytest.raises(SessionConflictError):
            store.put(session_id, state_of(i + 2), versions[session_id])
        assert store.drop(session_id)
        assert not store.drop(session_id)
    assert list(store) == []


# ------------------------------------------------------------------------------------------------ clients that work

CLIENTS: dict[str, Callable[[RedisServer], Any]] = {
    "plain": lambda s: redis.Redis(port=s.port, password=PASSWORD),
    "strict": lambda s: redis.StrictRedis(port=s.port, password=PASSWORD),
    "pool": lambda s: redis.Redis(connection_pool=redis.ConnectionPool.from_url(s.url)),
    "blocking": lambda s: redis.Redis(connection_pool=redis.BlockingConnectionPool.from_url(s.url, max_connections=2)),
    "one connection": lambda s: redis.Redis(port=s.port, password=PASSWORD, single_connection_client=True),
    "unix": lambda s: redis.Redis(unix_socket_path=str(s.socket), password=PASSWORD),
    "tls": lambda s: redis.Redis(port=s.tls_port, password=PASSWORD, ssl=True, ssl_ca_certs=str(s.certificate)),
    "resp3": lambda s: redis.Redis(port=s.port, password=PASSWORD, protocol=3),
    "resp3 in the url": lambda s: f"{s.url}?protocol=3",
    "retries": lambda s: redis.Redis(port=s.port, password=PASSWORD, retry=Retry(NoBackoff(), 3)),
    "latin-1": lambda s: redis.Redis(port=s.port, password=PASSWORD, encoding="latin-1"),
    "provider": lambda s: redis.Redis(
        port=s.port, credential_provider=UsernamePasswordCredentialProvider("default", PASSWORD)
    ),
}


@pytest.mark.parametrize("kind", CLIENTS)
def test_a_client_of_this_kind_keeps_sessions_and_no_thread_loses_an_update(kind: str, server: RedisServer):
    store = RedisStore(CLIENTS[kind](server), f"client {kind}:")
    keep_all(store)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: count_up(store, "call", 20), range(3)))
    assert int(store.get("call").state.utterances) == 60
    assert PASSWORD not in repr(store)


def test_a_cluster_keeps_sessions_on_all_of_its_nodes(cluster: RedisCluster):
    store = RedisStore(cluster_client(cluster), "all:")
    keep_all(store)
    for i in range(60):
        store.put(str(i), state_of(i))
    for node in cluster.nodes:
        with redis.Redis.from_url(node.url) as client:
            assert 5 < len(client.keys("all:*")) < 60
    assert sorted(map(int, store)) == list(range(60))  # of every node
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: count_up(store, "call", 20), range(3)))
    assert int(store.get("call").state.utterances) == 60
    assert repr(store).startswith("RedisStore('the cluster of 127.0.0.1:")
    assert PASSWORD not in repr(store)


def test_a_node_that_does_not_know_the_script_gets_it(cluster: RedisCluster):
    """A replica that was promoted, or a server that was started again."""
    store = RedisStore(cluster_client(cluster), "script:")
    versions = [store.put(str(i), state_of(i)) for i in range(10)]
    for node in cluster.nodes:
        with redis.Redis.from_url(node.url) as client:
            client.script_flush()
    for i, version in enumerate(versions):
        store.put(str(i), state_of(i + 1), version)
        with pytest.raises(SessionConflictError):
            store.put(str(i), state_of(i + 2), version)


def test_one_node_of_a_cluster_away_is_a_store_error_and_the_others_answer(short_path: Path):
    cluster = RedisCluster(short_path)
    with running(cluster):
        client = cluster_client(cluster)
        store = RedisStore(client)
        versions = {str(i): store.put(str(i), state_of(i)) for i in range(30)}
        away = cluster.nodes[1]
        away.kill()
        lost = {i for i in versions if client.get_node_from_key(f"mal_adapter:{i}").port == away.port}
        assert 0 < len(lost) < 30
        for i in lost:
            with pytest.raises(
                StoreError, match=r"can't read sessions in the cluster of 127\.0\.0\.1.*check"
            ) as caught:
                store.get(i)
            assert PASSWORD not in "".join(traceback.format_exception(caught.value))
        with pytest.raises(StoreError, match="can't list sessions in the cluster"):
            list(store)
        assert isinstance(repr(store), str)
        away.start()  # empty, for it kept nothing on its disk, but with its slots
        wait_until(lambda: answers(store))
        for i, version in versions.items():
            store.put(i, state_of(50), None if i in lost else version)


def answers(store: RedisStore) -> bool:
    """Whether every part of it does."""
    with contextlib.suppress(StoreError):
        for i in range(30):
            store.get(str(i))
        return True
    return False


@pytest.mark.parametrize("database", [0, 1])
def test_a_url_of_one_node_of_a_cluster_is_named(cluster: RedisCluster, database: int):
    store = RedisStore(f"{cluster.url[:-1]}{database}")
    with pytest.raises(StoreError, match=r"one node of a cluster; give RedisStore a redis\.RedisCluster"):
        [store.get(str(i)) for i in range(20)]


def test_a_sentinel_names_the_primary(watched: tuple[RedisServer, Sentinel]):
    server, sentinel = watched
    store = RedisStore(sentinel.manager().master_for(sentinel.service))
    keep_all(store)
    store.put("call", state_of(1))
    assert RedisStore(server.url).get("call").state.equals(state_of(1))
    assert repr(store).startswith(f"RedisStore(\"the service 'calls' of the sentinels 127.0.0.1:{sentinel.port}\"")


def sentinel_errors(server: RedisServer, sentinel: Sentinel) -> dict[str, tuple[Any, str]]:
    """Clients that can't reach a primary, and what the error says."""
    once = {"retry": Retry(NoBackoff(), 0)}
    nobody = ("127.0.0.1", free_port())
    at_nobodys = redis.sentinel.Sentinel([nobody], sentinel_kwargs=once, password=PASSWORD, **once)
    wrong = sentinel.manager().master_for("calls", password="wr0ng-primary", **once)
    return {
        "another name": (sentinel.manager().master_for("chats"), "'chats' of the sentinels .*No master found.*knows a"),
        "its password": (sentinel.manager(password="wr0ng-sentinel").master_for("calls"), "its own password"),
        "primary's": (wrong, "check the user, the password"),
        "nobody there": (at_nobodys.master_for("calls"), rf"No master.*127\.0\.0\.1:{nobody[1]} - "),
    }


def test_errors_under_a_sentinel_say_what_to_check_and_no_password(watched: tuple[RedisServer, Sentinel]):
    for name, (client, expected) in sentinel_errors(*watched).items():
        store = RedisStore(client)
        for access in (
            lambda s=store: s.get("call"),
            lambda s=store: s.put("call", state_of(1)),
            lambda s=store: list(s),
        ):
            with pytest.raises(StoreError, match=expected) as caught:
                access()
            printed = "".join(traceback.format_exception(caught.value)) + repr(store)
            assert not [word for word in ("wr0ng", PASSWORD, Sentinel.password) if word in printed], name
            assert len(str(caught.value)) < 500, "the sentinel's client is not quoted"
    server, sentinel = watched
    store = RedisStore(sentinel.manager().master_for("calls"))
    version = store.put("call", state_of(1))
    server.kill()
    with pytest.raises(StoreError, match=r"'calls' of the sentinels.*check"):
        store.put("call", state_of(2), version)
    server.start()
    wait_until(lambda: answers(store))
    store.put("call", state_of(2))


# ----------------------------------------------------------------------------------------------- clients that don't


class Elsewhere:
    """A cache of another library, with methods of the same names."""

    def get(self, key: str) -> None: ...
    def delete(self, key: str) -> None: ...


def refused(server: RedisServer) -> dict[str, tuple[Any, str]]:
    plain = redis.Redis(port=server.port, password=PASSWORD)
    pool = redis.ConnectionPool.from_url(server.url)
    manager = redis.sentinel.Sentinel([("127.0.0.1", 1)])
    awaited = "redis.asyncio, but a store calls its client synchronously.*give a redis.Redis"
    return {
        "asyncio": (redis.asyncio.Redis(), awaited),
        "asyncio url": (redis.asyncio.Redis.from_url(server.url), awaited),
        "asyncio cluster": (redis.asyncio.RedisCluster("127.0.0.1"), awaited),
        "asyncio sentinel": (redis.asyncio.Sentinel([("127.0.0.1", 1)]).master_for("calls"), awaited),
        "asyncio pool": (redis.asyncio.ConnectionPool(), awaited),
        "pipeline": (plain.pipeline(), "until execute.*give its client"),
        "transaction": (plain.pipeline(transaction=True), "until execute"),
        "pubsub": (plain.pubsub(), "give a URL, a redis.Redis"),
        "pool": (pool, r"give redis\.Redis\(connection_pool=pool\)"),
        "sentinel": (manager, r"give sentinel\.master_for"),
        "replica": (manager.slave_for("calls"), r"replica.*give sentinel\.master_for"),
        "decodes": (redis.Redis(decode_responses=True), "decode_responses=False"),
        "decoding pool": (
            redis.Redis(connection_pool=redis.ConnectionPool(decode_responses=True)),
            "decode_responses=False",
        ),
        "decoding primary": (manager.master_for("calls", decode_responses=True), "decode_responses=False"),
        "utf-16": (redis.Redis(encoding="utf-16"), "encoding='utf-8'"),
        "class": (redis.Redis, "the class Redis itself"),
        "nothing": (None, "NoneType; give a URL"),
        "bytes": (server.url.encode(), "bytes; give a URL"),
        "number": (6379, "give a URL"),
        "other library": (Elsewhere(), "Elsewhere; give a URL, a redis.Redis or a redis.RedisCluster.*Valkey"),
        "unknown option": (f"{server.url}?nosuch=1", "redis-py's names"),
        "wrong option": (f"rediss://:{PASSWORD}@127.0.0.1?ssl_cert_reqs=maybe", "the Redis URL is not valid"),
    }


def test_a_client_that_a_store_can_not_use_is_refused_when_it_is_made(server: RedisServer):
    for name, (client, expected) in refused(server).items():
        with pytest.raises(ConfigError, match=expected) as caught:
            RedisStore(client)
        assert PASSWORD not in "".join(traceback.format_exception(caught.value)), name


def test_a_clusters_clients_that_a_store_can_not_use_are_refused(cluster: RedisCluster):
    with pytest.raises(ConfigError, match="decode_responses=False"):
        RedisStore(cluster_client(cluster, decode_responses=True))
    with (
        pytest.raises(ConfigError, match="reads from replicas"),
        pytest.warns(DeprecationWarning, match="load_balancing"),
    ):
        RedisStore(cluster_client(cluster, read_from_replicas=True))
    with pytest.raises(ConfigError, match="until execute"):
        RedisStore(cluster_client(cluster).pipeline())


def test_a_cluster_that_was_never_reached_has_words_all_the_same():
    client = redis.cluster.RedisCluster.__new__(redis.cluster.RedisCluster)
    client.encoder = redis.Redis().get_encoder()
    store = RedisStore(client)
    assert "RedisCluster" in repr(store)
    with pytest.raises(StoreError, match="can't read sessions in the server of a RedisCluster"):
        store.get("call")


def test_the_prefix_is_a_string(server: RedisServer):
    for prefix in (b"calls:", None, 3, "\ud800"):
        with pytest.raises(ConfigError, match="prefix="):
            RedisStore(server.url, prefix)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        (None, "NoneType"),
        (6379, "int"),
        ("redis:/host", "redis://, two slashes"),
        ("redis:host:6379", "redis://, two slashes"),
        ("redis+sentinel://host/calls", r"for a cluster or Sentinel give RedisStore\(client\)"),
        ("redis-cluster://host", r"give RedisStore\(client\)"),
    ],
)
def test_a_place_that_is_not_valid_makes_no_folder(
    place: Any, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=expected):
        open_store(place)
    assert list(tmp_path.iterdir()) == []


def test_a_url_out_of_an_environment_variable_may_have_spaces_around_it():
    place = " redis://127.0.0.1:6379\n"
    assert repr(open_store(place)).startswith("RedisStore('redis://127.0.0.1:6379/0'")


# ------------------------------------------------------------------------------------------------ errors and retries


class Refusing(CredentialProvider):
    """A token server that can't be reached, and whose error has a secret in it."""

    def __init__(self) -> None:
        self.secret = "t0p-s3cret"

    def get_credentials(self) -> tuple[str, str]:
        raise RuntimeError(f"no token for {self.secret}") from ValueError(self.secret)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"credential_provider": Refusing()}, r"no token for ….*credential provider"),
        ({"username": "al1ce", "password": "wr0ng"}, "check the user, the password"),
        ({"credential_provider": UsernamePasswordCredentialProvider("al1ce", "wr0ng")}, "check the user"),
    ],
    ids=["provider fails", "password", "provider"],
)
def test_no_error_shows_a_secret(server: RedisServer, options: dict[str, Any], expected: str):
    store = RedisStore(redis.Redis(port=server.port, retry=Retry(NoBackoff(), 0), **options))
    with pytest.raises(StoreError, match=expected) as caught:
        store.put("call", state_of(1))
    printed = "".join(traceback.format_exception(caught.value)) + repr(store)
    assert not [word for word in ("t0p-s3cret", "wr0ng", "al1ce") if word in printed]


def test_a_user_who_may_not_write_is_not_named(server: RedisServer):
    with redis.Redis.from_url(server.url) as client:
        client.acl_setuser("al1ce", enabled=True, passwords=["+s3same"], keys="*", commands=["+get", "+client"])
    store = RedisStore(redis.Redis(port=server.port, username="al1ce", password="s3same"))
    assert store.get("nobody's") is None
    with pytest.raises(StoreError, match="their permissions") as caught:
        store.put("nobody's", state_of(1))
    assert "al1ce" not in "".join(traceback.format_exception(caught.value))


def test_an_error_of_a_sentinel_is_rid_of_the_password_that_older_versions_of_redis_py_quote():
    """Before 7.4 the text of a pool had all of its options."""
    manager = redis.sentinel.Sentinel([("127.0.0.1", 26379)], sentinel_kwargs={"password": "p'4ss"}, password="pr1mary")
    client = manager.master_for("calls")
    quoted = "Redis<ConnectionPool<Connection<password=p'4ss,host=127.0.0.1,port=26379,db=0>>>"

    def away(*_: object, **__: object) -> None:
        raise redis.sentinel.MasterNotFoundError(f"No master found for 'calls' : {quoted} - TimeoutError('pr1mary')")

    client.execute_command = away
    with pytest.raises(StoreError, match=r"'calls' : 127\.0\.0\.1:26379 - TimeoutError\('…'\)") as caught:
        RedisStore(client).get("call")
    printed = "".join(traceback.format_exception(caught.value))
    assert "p'4ss" not in printed
    assert "pr1mary" not in printed


def test_a_pool_without_a_free_connection_is_a_store_error_that_says_so(server: RedisServer):
    pool = redis.ConnectionPool.from_url(server.url, max_connections=1)
    store = RedisStore(redis.Redis(connection_pool=pool))
    store.get("call")
    taken = pool.get_connection()
    with pytest.raises(StoreError, match="raise max_connections"):
        store.get("call")
    pool.release(taken)
    store.get("call")


def test_a_put_that_a_client_sends_again_is_no_conflict_with_itself(server: RedisServer):
    proxy = Proxy(server.port)
    client = redis.Redis(port=proxy.own_port, password=PASSWORD, retry=Retry(NoBackoff(), 3))
    store, direct = RedisStore(client, "again:"), RedisStore(server.url, "again:")
    version = store.put("call", state_of(1))
    proxy.swallow_once = True
    version = store.put("call", state_of(2), version)
    assert not proxy.swallow_once, "an answer was lost"
    assert direct.get("call").version == version
    # What another writer has put is still a conflict, the same state included.
    direct.put("call", state_of(3), version)
    with pytest.raises(SessionConflictError):
        store.put("call", state_of(3), version)
    proxy.close()


def test_after_a_failover_behind_one_name_a_store_finds_the_new_primary(short_path: Path):
    """A name, or a proxy, that now leads elsewhere, while the old primary is a replica and keeps its connections."""
    (short_path / "old").mkdir()
    (short_path / "new").mkdir()
    old, new = RedisServer(short_path / "old", "--save", ""), RedisServer(short_path / "new", "--save", "")
    with running(old, new):
        proxy = Proxy(old.port)
        store = RedisStore(old.url.replace(str(old.port), str(proxy.own_port)))
        store.put("call", state_of(1))
        with redis.Redis.from_url(old.url) as client:
            client.replicaof("127.0.0.1", new.port)
        proxy.port = new.port
        with pytest.raises(StoreError, match="connect to the primary"):
            store.put("call", state_of(2), store.get("call").version)
        store.put("call", state_of(2))
        assert RedisStore(new.url).get("call").state.equals(state_of(2))
        proxy.close()
