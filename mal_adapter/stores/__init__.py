"""Stores of sessions: in this process, in a folder, or in Redis."""

import inspect
import os

from mal_adapter.errors import ConfigError
from mal_adapter.stores.base import SessionStore, Stored
from mal_adapter.stores.folder import FolderStore
from mal_adapter.stores.in_memory import InMemoryStore
from mal_adapter.stores.redis import RedisStore

__all__ = ["FolderStore", "InMemoryStore", "RedisStore", "SessionStore", "Stored", "as_store", "open_store"]

_REDIS_SCHEMES = ("redis", "rediss", "unix")


def open_store(where: str | os.PathLike[str], ttl_s: float | None = None) -> SessionStore:
    """Open the store at `where`: a `RedisStore` for `redis://`, `rediss://` and `unix://`, else a `FolderStore`.

    For a Redis cluster or Redis Sentinel, pass a client to `RedisStore`.

    Args:
        where: A Redis URL, or a folder, which is created if it does not exist.
        ttl_s: A session expires this many seconds after its last put; None means never.

    Raises:
        ConfigError: `where` is empty or not a valid URL, or `ttl_s` is not positive.
        StoreError: The folder can't be created.
        MissingDependencyError: redis-py is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     open_store(f"{folder}/sessions")
        FolderStore('.../sessions', ttl_s=None)
        >>> open_store("mongodb://host/sessions")
        Traceback (most recent call last):
        ...
        mal_adapter.errors.ConfigError: no store for mongodb:// URLs; give redis://, rediss://, unix:// or a folder
    """
    given: object = where
    if not isinstance(given, str | bytes | os.PathLike):
        raise ConfigError(f"can't open a store at a {type(given).__name__}; give a folder or a Redis URL")
    place = os.fsdecode(where).strip() if isinstance(given, str | bytes) else os.fsdecode(where)
    if not place:
        raise ConfigError("the place of the store is empty; give a folder, '.' for this one, or a URL of Redis")
    scheme, separator, _ = place.partition("://")
    if separator:
        if scheme in _REDIS_SCHEMES:
            return RedisStore(place, ttl_s=ttl_s)
        clients = "for a cluster or Sentinel give RedisStore(client); " if "redis" in scheme.lower() else ""
        raise ConfigError(f"no store for {scheme}:// URLs; {clients}give redis://, rediss://, unix:// or a folder")
    scheme, separator, _ = place.partition(":")
    if separator and scheme.lower() in _REDIS_SCHEMES:
        raise ConfigError(f"a Redis URL begins with {scheme.lower()}://, two slashes; write ./{scheme}:… for a folder")
    return FolderStore(place, ttl_s)


def as_store(store: SessionStore | str | os.PathLike[str] | None) -> SessionStore:
    """Convert a store, path or URL to a SessionStore; raise ConfigError otherwise. None makes an `InMemoryStore`."""
    if store is None:
        return InMemoryStore()
    if isinstance(store, str | os.PathLike):
        return open_store(store)
    if isinstance(store, type):
        raise ConfigError(f"store is the class {store.__name__} itself; give an instance, {store.__name__}(…)")
    name = f"{type(store).__module__.partition('.')[0]}.{type(store).__name__}".removeprefix("builtins.")
    needed = ("get", "put", "drop", "__iter__")
    if missing := [method for method in needed if not callable(getattr(store, method, None))]:
        raise ConfigError(
            f"store is a {name} without {', '.join(missing)}; give a SessionStore, a folder or a Redis URL, and a "
            "Redis client as RedisStore(client)"
        )
    if waits := [method for method in needed if inspect.iscoroutinefunction(getattr(store, method))]:
        raise ConfigError(f"store is a {name} whose {', '.join(waits)} must be awaited; give a synchronous store")
    return store
