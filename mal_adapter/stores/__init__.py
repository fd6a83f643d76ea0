"""Where the states of dialogues are kept: in this process, in a folder, or in Redis."""

import os

from mal_adapter.errors import ConfigError
from mal_adapter.stores.base import SessionStore, Stored
from mal_adapter.stores.folder import FolderStore
from mal_adapter.stores.memory import InMemoryStore
from mal_adapter.stores.redis import RedisStore

__all__ = ["FolderStore", "InMemoryStore", "RedisStore", "SessionStore", "Stored", "open_store"]


def open_store(where: str | os.PathLike[str], ttl_s: float | None = None) -> SessionStore:
    """The store at `where`: a `RedisStore` for `redis://`, `rediss://` and `unix://`, else a `FolderStore`.

    Args:
        where: A URL of Redis, or a folder, which is created if need be.
        ttl_s: Seconds after its last put at which a session expires; None for never.

    Raises:
        ConfigError: It is a URL of another kind, or can't be understood; or `ttl_s` is not positive.
        StoreError: The folder can't be created, or redis-py is not installed.

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
    place = os.fspath(where)
    scheme, separator, _ = place.partition("://")
    if not separator:
        return FolderStore(place, ttl_s)
    if scheme in ("redis", "rediss", "unix"):
        return RedisStore(place, ttl_s=ttl_s)
    raise ConfigError(f"no store for {scheme}:// URLs; give redis://, rediss://, unix:// or a folder")
