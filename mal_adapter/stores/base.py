"""What a session store does, and what every store checks in its arguments."""

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from mal_adapter.errors import ConfigError, SessionError
from mal_adapter.memory.state import MemoryState

__all__ = ["SessionStore", "Stored", "check_count", "check_ttl", "id_bytes"]


class Stored(NamedTuple):
    """A state as it lies in a store.

    Attributes:
        state: Of batch size 1 and detached.
        version: Names this content; to be given back to `put`.
    """

    state: MemoryState
    version: str


class SessionStore(Protocol):
    """The states of dialogues by session id: in this process, in a folder, in Redis, or wherever these four reach.

    Any thread may call any of them. Two processes may share a store unless it lives in one of them.
    """

    def get(self, session_id: str) -> Stored | None:
        """The state of a session, or None where there is none, or none any more.

        Raises:
            StoreError: The store can't be reached.
            StateFormatError: What it holds is damaged, or is no state.
        """

    def put(self, session_id: str, state: MemoryState, version: str | None = None) -> str:
        """Keep `state`, all of it or, on an error, nothing.

        Args:
            session_id: A non-empty string.
            state: Of batch size 1 and detached.
            version: What `get` or the last `put` of this session gave; None for a session that is new.

        Returns:
            The version of what is kept now.

        Raises:
            SessionConflictError: Someone else has kept another state since; theirs stays. A session that has expired,
                been evicted or been dropped is no conflict: who goes on with it begins it anew.
            StoreError: The store can't be reached or is full.
        """

    def drop(self, session_id: str) -> bool:
        """Forget a session; whether there was one.

        Raises:
            StoreError: The store can't be reached.
        """

    def __iter__(self) -> Iterator[str]:
        """The ids of all sessions, in no particular order.

        Raises:
            StoreError: The store can't be reached.
        """


def check_count(name: str, value: int | None) -> None:
    """Raise `ConfigError` unless `value` is a positive integer, or None for no limit."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"{name}={value!r} is neither a positive integer nor None, which sets no limit")


def check_ttl(ttl_s: float | None) -> None:
    """Raise `ConfigError` unless `ttl_s` is a positive number of seconds, or None for ever."""
    if ttl_s is None:
        return
    number = isinstance(ttl_s, (int, float)) and not isinstance(ttl_s, bool)
    if not number or not math.isfinite(ttl_s) or ttl_s <= 0:
        raise ConfigError(f"ttl_s={ttl_s!r} is neither a positive number of seconds nor None, which keeps for ever")


def id_bytes(session_id: object) -> bytes:
    """A session id as UTF-8, the form in which it leaves the process.

    Raises:
        SessionError: It is not a non-empty string, or holds a lone surrogate, which is no character.
    """
    if not isinstance(session_id, str) or not session_id:
        raise SessionError(f"session id {session_id!r} is not a non-empty string; str() makes one of a number")
    try:
        return session_id.encode()
    except UnicodeEncodeError as error:
        raise SessionError(f"session id {session_id!r} is not valid Unicode: {error}") from error
