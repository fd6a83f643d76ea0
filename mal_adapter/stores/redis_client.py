"""A client of Redis that waits seconds, not minutes; and its errors as `StoreError`, without secrets."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mal_adapter.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from redis import Redis

__all__ = ["TIMEOUT_S", "connect", "explained", "where"]

TIMEOUT_S = 5.0  # of connecting and of each answer, unless the URL says otherwise


def connect(url: str) -> "Redis":
    """A client of the Redis at `url`; nothing is sent yet.

    Raises:
        ConfigError: The URL can't be understood.
        StoreError: redis-py is not installed.
    """
    try:
        from redis import Redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError as error:
        raise StoreError("sessions in Redis need redis-py: pip install 'mal-adapter[redis]'") from error
    # Without retries, which redis-py ≥ 6 has by default: a put that is sent twice would conflict with itself, and a
    # Redis that is down would be waited for again and again.
    retry = Retry(NoBackoff(), 0)
    try:
        return Redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, retry=retry)
    except ValueError:
        # Not chained, and the error not quoted: a password with a slash in it ends up there as an invalid port.
        raise ConfigError(
            "the Redis URL can't be understood; write redis://[user][:password]@host[:port][/db], with rediss:// for "
            "TLS, and percent-encode / # ? @ in the password"
        ) from None


def where(client: "Redis") -> str:
    """The URL of a client without user, password and options, any of which may hold a secret."""
    from redis import SSLConnection

    pool = client.connection_pool
    options = pool.connection_kwargs
    if "path" in options:
        return f"unix://{options['path']}?db={options.get('db', 0)}"
    scheme = "rediss" if issubclass(pool.connection_class, SSLConnection) else "redis"
    return f"{scheme}://{options.get('host', 'localhost')}:{options.get('port', 6379)}/{options.get('db', 0)}"


@contextmanager
def explained(action: str, client: "Redis") -> Iterator[None]:
    """Turn an error of Redis inside into a `StoreError` that says what failed, where, why, and what helps."""
    from redis import RedisError

    try:
        yield
    except (RedisError, OSError, UnicodeError) as error:  # UnicodeError: of a host that is no name
        raise StoreError(f"can't {action} sessions in {where(client)}: {error}; {_advice(error)}") from error


def _advice(error: Exception) -> str:
    from redis import exceptions

    if isinstance(error, (exceptions.AuthenticationError, exceptions.AuthorizationError, exceptions.NoPermissionError)):
        return "check the user, the password and what they may do"
    if isinstance(error, exceptions.ReadOnlyError):
        return "this is a replica; connect to the primary"
    if "maxmemory" in str(error):  # of no one type: before Redis 7 a script's error has its own words around it
        return "raise Redis's maxmemory, or give sessions a ttl_s"
    if isinstance(error, exceptions.ResponseError):
        return "see Redis's log"
    return "check that Redis runs there and that host, port and TLS are right"
