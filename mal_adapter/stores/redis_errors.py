"""The address of a Redis client, and its errors as `StoreError`. No message has a secret in it."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import quote

from mal_adapter.errors import StoreError

__all__ = ["explained", "where"]

_SECRET_OPTIONS = ("password", "username", "ssl_password")
# redis-py's error of a Sentinel quotes the whole client that asked it, " - " and its error; its address is enough.
_CLIENT = re.compile(r"<?(?:redis\.\w+\.)?Redis[<(].*?\bhost=([^,>)]*),port=(\d+).*? - ")
_SHOWN = 3  # addresses of a cluster or of sentinels in one message


def where(client: Any) -> str:
    """The address of a client, without user, password and options, any of which may be a secret."""
    with suppress(Exception):  # a client that was never connected, or a redis-py with other attributes
        return _place(client)
    return f"the server of a {type(client).__name__}"


@contextmanager
def explained(action: str, client: Any) -> Iterator[None]:
    """Turn any error of a client into a `StoreError` with the action, the address, the reason and a remedy.

    Any error, not only redis-py's: clients of clusters, credential providers and name resolution raise others.
    """
    try:
        yield
    except Exception as error:
        secrets = _secrets(client)
        reason = _without(secrets, _CLIENT.sub(r"\1:\2 - ", str(error))) or type(error).__name__
        # A traceback shows chained errors too.
        secret = any(_without(secrets, str(one)) != str(one) for one in _chain(error))
        message = f"can't {action} sessions in {where(client)}: {reason}; {_advice(error)}"
        raise StoreError(message) from (None if secret else error)


def _place(client: Any) -> str:
    if (nodes := getattr(client, "nodes_manager", None)) is not None:
        return f"the cluster of {_listed(f'{_host(node.host)}:{node.port}' for node in nodes.startup_nodes.values())}"
    pool = client.connection_pool
    options = pool.connection_kwargs
    if (manager := getattr(pool, "sentinel_manager", None)) is not None:
        known = [sentinel.connection_pool.connection_kwargs for sentinel in manager.sentinels]
        addresses = _listed(f"{_host(each['host'])}:{each['port']}" for each in known)
        return f"the service {pool.service_name!r} of the sentinels {addresses}"
    if "path" in options:
        return f"unix://{options['path']}?db={options.get('db', 0)}"
    from redis import SSLConnection

    scheme = "rediss" if issubclass(pool.connection_class, SSLConnection) else "redis"
    host = _host(options.get("host", "localhost"))
    return f"{scheme}://{host}:{options.get('port', 6379)}/{options.get('db', 0) or 0}"


def _host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _listed(addresses: Iterable[str]) -> str:
    every = sorted(addresses)
    return ", ".join(every[:_SHOWN]) + (f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else "")


def _secrets(client: Any) -> list[str]:
    """The secrets in a client's options, which no message may have, the longest first."""
    options: list[dict[str, Any]] = []
    with suppress(Exception):
        options.append(client.get_connection_kwargs())
    with suppress(Exception):
        options.append(client.connection_pool.connection_kwargs)
    with suppress(Exception):
        manager = client.connection_pool.sentinel_manager
        options += [manager.connection_kwargs, manager.sentinel_kwargs]
        options += [sentinel.connection_pool.connection_kwargs for sentinel in manager.sentinels]
    found = {each.get(name) for each in options for name in _SECRET_OPTIONS}
    for provider in {id(p): p for each in options if (p := each.get("credential_provider")) is not None}.values():
        found |= {value for value in getattr(provider, "__dict__", {}).values() if isinstance(value, str | bytes)}
    words = {word.decode(errors="replace") if isinstance(word, bytes) else str(word) for word in found if word}
    spelled = words | {repr(word)[1:-1] for word in words} | {quote(word, safe="") for word in words}
    return sorted(spelled, key=len, reverse=True)


def _without(secrets: list[str], text: str) -> str:
    for secret in secrets:
        # A short one only as a whole word: removed from within other words, the gaps would show what it is.
        pattern = re.escape(secret) if len(secret) > 5 else rf"(?<!\w){re.escape(secret)}(?!\w)"
        text = re.sub(pattern, "…", text)
    return text


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _advice(error: Exception) -> str:
    from redis import exceptions
    from redis.sentinel import MasterNotFoundError

    text = str(error)
    if isinstance(error, MasterNotFoundError):
        return (
            "check that a sentinel runs there, that it knows a healthy primary of this name, and its own password and "
            "timeout (sentinel_kwargs of redis.Sentinel)"
        )
    if "master is now a slave" in text or isinstance(error, exceptions.BusyLoadingError):
        return "Redis is changing over or starting; try again soon"
    if isinstance(error, (exceptions.AuthenticationError, exceptions.AuthorizationError, exceptions.NoPermissionError)):
        return "check the user, the password and their permissions"
    if isinstance(error, exceptions.ReadOnlyError):
        return "this is a replica; connect to the primary"
    if isinstance(error, exceptions.ClusterDownError) or _is_clusters(error):
        return "check the cluster's nodes, their addresses and that all slots are covered (redis-cli cluster info)"
    if isinstance(error, exceptions.AskError) or text.startswith("MOVED ") or "cluster mode" in text:
        return "this is one node of a cluster; give RedisStore a redis.RedisCluster, which finds the others"
    if "maxmemory" in text:  # the type differs: before Redis 7, a script's error has other words around it
        return "raise Redis's maxmemory, or give sessions a ttl_s"
    if "Too many connections" in text or "No connection available" in text:  # the client's own pool
        return "raise max_connections of the client's pool, or use a BlockingConnectionPool with a longer timeout"
    if "max number of clients" in text:
        return "raise Redis's maxclients, or close clients"
    if isinstance(error, exceptions.ResponseError):
        return "see Redis's log"
    if isinstance(error, (exceptions.RedisError, OSError, UnicodeError)):  # UnicodeError: of an invalid host name
        return "check that Redis runs there and that host, port and TLS are right"
    return f"a {type(error).__name__} is not an error of Redis; check the client's settings and its credential provider"


def _is_clusters(error: Exception) -> bool:
    from redis.exceptions import RedisClusterException

    return isinstance(error, RedisClusterException)
