"""Checks of Redis clients. A client that a store can't use is refused when the store is made."""

from typing import TYPE_CHECKING, Any, cast

from mal_adapter.errors import ConfigError
from mal_adapter.extras import explain_missing

if TYPE_CHECKING:
    from redis import Redis
    from redis.cluster import RedisCluster

__all__ = ["check_client", "connect"]

TIMEOUT_S = 5.0  # of connecting and of each answer, unless the URL has another one

_SPELLING = (
    "write redis://[user][:password]@host[:port][/db], with rediss:// for TLS, and percent-encode / # ? @ in the "
    "password; options follow as ?socket_timeout=1 and have redis-py's names"
)


def connect(url: str) -> "Redis":
    """A client of the Redis at `url`, which is not connected yet.

    Raises:
        ConfigError: The URL is not valid, or has an option that redis-py does not know.
        MissingDependencyError: redis-py is not installed.
    """
    redis = _redis()
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    # No retries, which redis-py ≥ 6 does by default: each call would wait several times for a Redis that is down.
    retry = Retry(NoBackoff(), 0)
    try:
        client: Redis = redis.Redis.from_url(
            url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, retry=retry
        )
        pool = client.connection_pool
        pool.connection_class(**pool.connection_kwargs)  # does not connect, but checks the names of the options
    except (ValueError, TypeError, redis.RedisError):
        # Neither chained nor quoted: redis-py's error shows a password with a slash in it as an invalid port.
        raise ConfigError(f"the Redis URL is not valid; {_SPELLING}") from None
    return client


def check_client(client: object) -> "Redis | RedisCluster":
    """Return `client` if a store can use it.

    Raises:
        ConfigError: A store can't use it; the message says what to give instead.
        MissingDependencyError: redis-py is not installed.
    """
    _redis()
    if (refusal := _other_object(client) or _other_setting(client)) is not None:
        raise ConfigError(f"RedisStore got {refusal}")
    return cast("Redis | RedisCluster", client)


def _redis() -> Any:
    with explain_missing("RedisStore", extra="redis"):
        import redis
    return redis


def _other_object(client: object) -> str | None:
    """Why the type of this object is wrong; None if it is a synchronous client of redis-py."""
    from redis import ConnectionPool, Redis, RedisCluster
    from redis.client import Pipeline
    from redis.cluster import ClusterPipeline
    from redis.sentinel import Sentinel

    kind = type(client)
    name = f"{kind.__module__.partition('.')[0]}.{kind.__name__}".removeprefix("builtins.")
    if isinstance(client, type):
        return f"the class {client.__name__} itself; give a client, {client.__name__}(host, port)"
    if any(base.__module__.startswith("redis.asyncio") for base in kind.__mro__):
        return (
            f"a {kind.__name__} of redis.asyncio, but a store calls its client synchronously; give a "
            "redis.Redis or a redis.RedisCluster, and run the model in a thread, as asyncio.to_thread does"
        )
    if isinstance(client, Pipeline | ClusterPipeline):
        return f"a {name}, which collects commands until execute(); give its client"
    if isinstance(client, Sentinel):
        return f"a {name}, which is not a client; give sentinel.master_for('name of the service')"
    if isinstance(client, ConnectionPool):
        return f"a {name}; give redis.Redis(connection_pool=pool)"
    if not isinstance(client, Redis | RedisCluster):
        return (
            f"a {name}; give a URL, a redis.Redis or a redis.RedisCluster. They also work with Valkey and "
            "other servers that have Redis's protocol"
        )
    return None


def _other_setting(client: Any) -> str | None:
    """Why the settings of this client are wrong; None if they are right."""
    encoder = client.get_encoder()
    if encoder.decode_responses:
        return "a client that decodes responses, but states are bytes; set decode_responses=False"
    if encoder.encode("0") != b"0":
        return f"a client that encodes commands as {encoder.encoding}, which Redis does not read; set encoding='utf-8'"
    if not getattr(getattr(client, "connection_pool", None), "is_master", True):
        return "a client of a replica, which can't be written to; give sentinel.master_for('name of the service')"
    if getattr(client, "read_from_replicas", False) or getattr(client, "load_balancing_strategy", None) is not None:
        return (
            "a cluster's client that reads from replicas, where a state may be older than the last utterance; leave "
            "read_from_replicas and load_balancing_strategy out"
        )
    if getattr(client, "connection", None) is not None and not hasattr(client, "single_connection_lock"):
        return (
            "a client of one connection, which threads can't share in this version of redis-py; leave "
            "single_connection_client out, or upgrade redis-py"
        )
    return None
