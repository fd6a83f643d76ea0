"""The states of the dialogues for one step of the engine: read before it, saved after it."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from time import monotonic

from mal_adapter.errors import MalAdapterError, SessionConflictError, StoreError, UnsavedSessionWarning
from mal_adapter.memory.state import MemoryState
from mal_adapter.stores.states import SessionStates

__all__ = ["Found", "StepSessions"]

log = logging.getLogger("vllm.mal_adapter")

Found = MemoryState | str | None
"""A session's state on the CPU; None for a new session; or why it can't be read."""

_PAUSE_S = 1.0  # after a store did not answer: each attempt may wait for seconds, and the whole engine with it


class StepSessions:
    """The dialogues that one step continues.

    With tensor parallelism each rank makes one of these. Rank 0 alone asks the store, and all read what it found.

    Args:
        states: All dialogues; None on other ranks than 0.
        check: Raises if a state does not fit the adapter.
        share: Gives every rank the object of rank 0.
    """

    def __init__(
        self,
        states: SessionStates | None,
        check: Callable[[MemoryState], None],
        share: Callable[[object], object] | None = None,
    ) -> None:
        self.states = states
        self._check = check
        self._share = share
        self._open = ExitStack()
        self._asked_again_at_s = 0.0
        self._clock = monotonic  # tests replace it

    def open(self, session_ids: Sequence[str]) -> dict[str, Found]:
        """What the store has of these distinct sessions, which stay open until `close`."""
        found: dict[str, Found] = {}
        if self.states is not None:
            found = {session_id: self._find(self.states, session_id) for session_id in session_ids}
        if self._share is None:
            return found
        packed = {k: v.to_bytes() if isinstance(v, MemoryState) else v for k, v in found.items()}
        shared = self._share(packed)
        assert isinstance(shared, dict)
        return {k: MemoryState.from_bytes(v) if isinstance(v, bytes) else v for k, v in shared.items()}

    def save(self, states: Mapping[str, MemoryState]) -> dict[str, StoreError | SessionConflictError]:
        """Save new states of open sessions. Returns the errors: a `StoreError` of a session that is kept in this
        process until the store is back, a `SessionConflictError` of one that another engine has continued."""
        failed: dict[str, StoreError | SessionConflictError] = {}
        for session_id, state in states.items() if self.states is not None else ():
            assert self.states is not None
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", UnsavedSessionWarning)
                    self.states.keep({session_id: state})
                if caught:
                    failed[session_id] = StoreError(str(caught[-1].message))
            except (StoreError, SessionConflictError) as error:
                failed[session_id] = error
        return failed

    def close(self) -> None:
        """Close the open sessions."""
        self._open.close()

    def _find(self, states: SessionStates, session_id: str) -> Found:
        if self._clock() < self._asked_again_at_s and session_id not in states.backlog:
            return "the store did not answer a moment ago"
        try:
            found = self._open.enter_context(states.opened([session_id], save_at_end=False))
            state = found.get(session_id)
            if state is not None:
                self._check(state)
                state = state.to("cpu")
            return state
        except StoreError as error:
            self._asked_again_at_s = self._clock() + _PAUSE_S
            return str(error)
        except MalAdapterError as error:  # a damaged state, or one of another adapter
            return str(error)
