"""Which clients of Redis a store can use; the others are refused when the store is made, with what to give instead."""

from typing import TYPE_CHECKING, Any, cast

from mal_adapter.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from redis import Redis
    from redis.cluster import RedisCluster

__all__ = ["TIMEOUT_S", "check_client", "connect"]

TIMEOUT_S = 5.0  # of connecting and of each answer, unless the URL says otherwise

_SPELLING = (
    "write redis://[user][:password]@host[:port][/db], with rediss:// for TLS, and percent-encode / # ? @ in the "
    "password; options follow as ?socket_timeout=1 and have the names that redis-py gives them"
)


def connect(url: str) -> "Redis":
    """A client of the Redis at `url`; nothing is sent yet.

    Raises:
        ConfigError: The URL can't be understood, or has an option that redis-py does not know.
        StoreError: redis-py is not installed.
    """
    redis = _redis()
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    # Without retries, which redis-py ≥ 6 has by default: a Redis that is down would be waited for again and again.
    retry = Retry(NoBackoff(), 0)
    try:
        client: Redis = redis.Redis.from_url(
            url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, retry=retry
        )
        pool = client.connection_pool
        pool.connection_class(**pool.connection_kwargs)  # connects to nothing, but knows the names of the options
    except (ValueError, TypeError, redis.RedisError):
        # Not chained, and the error not quoted: a password with a slash in it ends up there as an invalid port.
        raise ConfigError(f"the Redis URL can't be understood; {_SPELLING}") from None
    return client


def check_client(client: object) -> "Redis | RedisCluster":
    """`client`, if it is one that a store can use.

    Raises:
        ConfigError: It is none; the message says what to give instead.
        StoreError: redis-py is not installed.
    """
    _redis()
    if (refusal := _other_object(client) or _other_setting(client)) is not None:
        raise ConfigError(f"RedisStore got {refusal}")
    return cast("Redis | RedisCluster", client)


def _redis() -> Any:
    try:
        import redis
    except ImportError as error:
        raise StoreError("sessions in Redis need redis-py: pip install 'mal-adapter[redis]'") from error
    return redis


def _other_object(client: object) -> str | None:
    """What is wrong with the kind of this object; None if it is a client of redis-py that answers at once."""
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
            f"a {kind.__name__} of redis.asyncio, whose answers must be awaited, which a store's calls are not; give a "
            "redis.Redis or a redis.RedisCluster, and run the model in a thread, as asyncio.to_thread does"
        )
    if isinstance(client, Pipeline | ClusterPipeline):
        return f"a {name}, which keeps commands back until execute(); give the client that made it"
    if isinstance(client, Sentinel):
        return f"a {name}, which manages clients and is none; give sentinel.master_for('name of the service')"
    if isinstance(client, ConnectionPool):
        return f"a {name}; give redis.Redis(connection_pool=pool)"
    if not isinstance(client, Redis | RedisCluster):
        return (
            f"a {name}; give a URL, a redis.Redis or a redis.RedisCluster. They work with Valkey's and other servers "
            "that speak Redis's protocol, too"
        )
    return None


def _other_setting(client: Any) -> str | None:
    """What is wrong with how this client is set up; None if nothing is."""
    encoder = client.get_encoder()
    if encoder.decode_responses:
        return "a client that decodes responses, and states are bytes; set decode_responses=False"
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
