"""Time that passes for the sessions of a store, without waiting for it."""

import os

from mal_adapter.stores import FolderStore, InMemoryStore, RedisStore, SessionStore


def let_time_pass(store: SessionStore, seconds: float) -> None:
    """Make every session of a store older by `seconds`, as if nobody had used the store for so long."""
    if isinstance(store, InMemoryStore):
        clock = store._clock
        store._clock = lambda: clock() + seconds
    elif isinstance(store, FolderStore):
        for path in store.folder.glob("*.safetensors"):
            status = path.stat()
            os.utime(path, (status.st_atime - seconds, status.st_mtime - seconds))
    elif isinstance(store, RedisStore):
        client = store._client
        for session_id in list(store):
            key = store.prefix + session_id
            left_ms = client.pttl(key)
            if left_ms >= 0:  # else it never expires
                client.pexpire(key, max(left_ms - round(seconds * 1000), 0))
    else:
        raise TypeError(type(store))
