"""`InMemoryStore`: sessions in this process's memory, of which the least recently used are evicted."""

import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator
from time import monotonic
from typing import NamedTuple, NoReturn

from mal_adapter.errors import CopyError, SessionConflictError
from mal_adapter.memory.state import MemoryState
from mal_adapter.stores.base import Stored, check_count, check_ttl, encode_session_id
from mal_adapter.stores.forking import renew_after_fork

__all__ = ["InMemoryStore"]


class _Entry(NamedTuple):
    stored: Stored
    nbytes: int
    used_at_s: float


class InMemoryStore:
    """Sessions in the memory of this process. Its size is bounded: the least recently used sessions are evicted.

    A get or a put uses a session; listing does not. The newest session always stays, whatever its size. States are not
    copied.

    Args:
        max_sessions: The largest number of sessions; None for no limit.
        ttl_s: A session expires this many seconds after its last use; None means never.
        max_bytes: The largest number of bytes of all tensors (`MemoryState.nbytes`); None for no limit.

    Attributes:
        evicted: How many sessions have been evicted so far; expired ones are not counted.

    Raises:
        ConfigError: A limit is not positive.

    Example:
        >>> from mal_adapter import MemoryAdapter, MemoryConfig
        >>> adapter = MemoryAdapter(MemoryConfig(hidden_size=32, memory_dim=16)).eval()
        >>> store = InMemoryStore(max_sessions=2)
        >>> version = store.put("call-1", adapter.initial_state())
        >>> version = store.put("call-1", adapter.initial_state(), version)
        >>> _ = store.put("call-2", adapter.initial_state()), store.put("call-3", adapter.initial_state())
        >>> sorted(store), store.evicted
        (['call-2', 'call-3'], 1)
        >>> store.get("call-1") is None
        True
    """

    def __init__(
        self, max_sessions: int | None = 1024, ttl_s: float | None = None, max_bytes: int | None = None
    ) -> None:
        check_count("max_sessions", max_sessions)
        check_count("max_bytes", max_bytes)
        check_ttl(ttl_s)
        self.max_sessions = max_sessions
        self.ttl_s = ttl_s
        self.max_bytes = max_bytes
        self.evicted = 0
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._nbytes = 0
        self._clock = monotonic  # tests replace it
        # Never used twice: the version of a deleted session must not match a new session with the same id.
        self._versions = itertools.count(1)
        self._renew_locks()
        renew_after_fork(self)

    def get(self, session_id: str) -> Stored | None:
        """The state of a session, the same tensors that were put, or None if it does not exist or has expired.

        Raises:
            SessionError: `session_id` is not a non-empty string.
        """
        encode_session_id(session_id)
        with self._lock:
            now = self._purge()
            entry = self._entries.get(session_id)
            if entry is None:
                return None
            self._entries[session_id] = entry._replace(used_at_s=now)
            self._entries.move_to_end(session_id)
            return entry.stored

    def put(self, session_id: str, state: MemoryState, version: str | None = None) -> str:
        """Save `state` itself, not a copy, and evict other sessions if there are too many.

        Arguments and result are those of `SessionStore.put`.

        Raises:
            SessionConflictError: Another writer has saved another state since; its state stays.
            SessionError: `session_id` is not a non-empty string.
        """
        encode_session_id(session_id)
        with self._lock:
            now = self._purge()
            kept = self._entries.get(session_id)
            if kept is not None and kept.stored.version != version:
                raise SessionConflictError(
                    f"another writer has saved session {session_id!r} since version {version}; get it again"
                )
            self._remove(session_id)
            stored = Stored(state, str(next(self._versions)))
            self._entries[session_id] = _Entry(stored, state.nbytes, now)
            self._nbytes += state.nbytes
            self._evict()
            return stored.version

    def drop(self, session_id: str) -> bool:
        """Delete a session. Returns whether it existed.

        Raises:
            SessionError: `session_id` is not a non-empty string.
        """
        encode_session_id(session_id)
        with self._lock:
            self._purge()
            return self._remove(session_id)

    def __iter__(self) -> Iterator[str]:
        """The ids of all current sessions, least recently used first."""
        with self._lock:
            self._purge()
            return iter(tuple(self._entries))

    def __len__(self) -> int:
        with self._lock:
            self._purge()
            return len(self._entries)

    def __repr__(self) -> str:
        return f"InMemoryStore({len(self)} sessions, {self._nbytes} bytes, {self.evicted} evicted)"

    def __getstate__(self) -> NoReturn:
        raise CopyError(
            "an InMemoryStore belongs to one process; a copy would be another store with other sessions. Give the "
            "other process a FolderStore or a Redis URL, or send it single states: MemoryState.to_bytes"
        )

    def _renew_locks(self) -> None:
        self._lock = threading.Lock()

    def _remove(self, session_id: str) -> bool:
        entry = self._entries.pop(session_id, None)
        if entry is None:
            return False
        self._nbytes -= entry.nbytes
        return True

    def _purge(self) -> float:
        """Delete expired sessions, in the order of their last use. Returns the time in seconds."""
        now = self._clock()
        while self.ttl_s is not None and self._entries:
            first = next(iter(self._entries))
            if now - self._entries[first].used_at_s < self.ttl_s:
                break
            self._remove(first)
        return now

    def _evict(self) -> None:
        def too_many() -> bool:
            count, size = self.max_sessions, self.max_bytes
            return (count is not None and len(self._entries) > count) or (size is not None and self._nbytes > size)

        while len(self._entries) > 1 and too_many():
            self._remove(next(iter(self._entries)))
            self.evicted += 1
