"""The interface of session stores, and checks of arguments that all stores share."""

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from mal_adapter.errors import ConfigError, SessionError
from mal_adapter.memory.state import MemoryState

__all__ = ["SessionStore", "Stored", "check_count", "check_ttl", "encode_session_id"]


class Stored(NamedTuple):
    """A state from a store.

    Attributes:
        state: Of batch size 1 and detached.
        version: Identifies this content; pass it to the next `put`.
    """

    state: MemoryState
    version: str


class SessionStore(Protocol):
    """The states of dialogues by session id. Any object with these four methods is a store.

    Any thread may call any of them. Processes may share a store unless it is in the memory of one of them.
    """

    def get(self, session_id: str) -> Stored | None:
        """The state of a session, or None if it does not exist or has expired.

        Raises:
            StoreError: The store can't be reached.
            StateFormatError: The stored bytes are damaged, or are not a state.
        """

    def put(self, session_id: str, state: MemoryState, version: str | None = None) -> str:
        """Save `state` completely or, on an error, not at all.

        Args:
            session_id: A non-empty string.
            state: Of batch size 1 and detached.
            version: What `get` or the last `put` of this session returned; None for a new session.

        Returns:
            The version of the saved state.

        Raises:
            SessionConflictError: Another writer has saved another state since; its state stays. Writing to an
                expired, evicted or deleted session starts a new one; this is not a conflict.
            StoreError: The store can't be reached or is full.
        """

    def drop(self, session_id: str) -> bool:
        """Delete a session. Returns whether it existed.

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
    """Raise `ConfigError` unless `ttl_s` is a positive number of seconds, or None for never."""
    if ttl_s is None:
        return
    number = isinstance(ttl_s, (int, float)) and not isinstance(ttl_s, bool)
    if not number or not math.isfinite(ttl_s) or ttl_s <= 0:
        raise ConfigError(f"ttl_s={ttl_s!r} is neither a positive number of seconds nor None, which means never")


def encode_session_id(session_id: object) -> bytes:
    """Encode a session id as UTF-8.

    Raises:
        SessionError: It is not a non-empty string, or has a lone surrogate, which is not a character.
    """
    if not isinstance(session_id, str) or not session_id:
        raise SessionError(f"session id {session_id!r} is not a non-empty string; convert a number with str()")
    try:
        return session_id.encode()
    except UnicodeEncodeError as error:
        raise SessionError(f"session id {session_id!r} is not valid Unicode: {error}") from error
