"""What a session store does: it keeps one state per session id, and lets no writer overwrite what it has not seen."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from mal_adapter.state import MemoryState

__all__ = ["SessionStore", "Stored"]


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
