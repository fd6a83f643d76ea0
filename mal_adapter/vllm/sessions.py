"""The states of the dialogues for one step of the engine: read before it, saved after it."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from time import monotonic
from typing import NamedTuple

from mal_adapter.errors import MalAdapterError, SessionConflictError, StoreError, UnsavedSessionWarning
from mal_adapter.memory.state import MemoryState
from mal_adapter.stores.states import SessionStates

__all__ = ["Found", "StepSessions", "Unsaved"]

log = logging.getLogger("vllm.mal_adapter")

Found = MemoryState | str | None
"""A session's state on the CPU; None for a new session; or why it can't be read."""

# How long a store that did not answer is not asked again, doubled each time: an attempt may wait for seconds, and the
# whole engine with it, also for requests without a session.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0


class Unsaved(NamedTuple):
    """A state that could not be saved.

    Attributes:
        reason: The message of the error.
        kept: Whether it is in this process until the store is back; else it is lost.
        conflict: Whether another engine has continued the session.
    """

    reason: str
    kept: bool
    conflict: bool = False


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
        self._outage: StoreError | None = None
        self._pause_s = _FIRST_PAUSE_S
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

    def save(self, states: Mapping[str, MemoryState]) -> dict[str, Unsaved]:
        """Save new states of open sessions. Returns those that are not in the store now."""
        failed: dict[str, Unsaved] = {}
        for session_id, state in states.items() if self.states is not None else ():
            assert self.states is not None
            paused = self._paused()
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", UnsavedSessionWarning)
                    self.states.keep({session_id: state}, outage=paused)
            except SessionConflictError as error:
                failed[session_id] = Unsaved(str(error), kept=False, conflict=True)
            except StoreError as error:  # and there is no room for it in this process
                failed[session_id] = Unsaved(str(error), kept=False)
            else:
                if caught:
                    failed[session_id] = Unsaved(str(caught[-1].message), kept=True)
            unsaved = failed.get(session_id)
            if paused is None and unsaved is not None and not unsaved.conflict:
                self._pause(unsaved.reason)
            elif paused is None:
                self._answers()
        return failed

    def close(self) -> None:
        """Close the open sessions."""
        self._open.close()

    def _find(self, states: SessionStates, session_id: str) -> Found:
        if session_id not in states.backlog and (outage := self._paused()) is not None:
            return str(outage)
        try:
            found = self._open.enter_context(states.opened([session_id], save_at_end=False))
            state = found.get(session_id)
            if state is not None:
                self._check(state)
                state = state.to("cpu")
        except StoreError as error:
            self._pause(str(error))
            return str(error)
        except MalAdapterError as error:  # a damaged state, or one of another adapter
            return str(error)
        if session_id not in states.backlog:
            self._answers()
        return state

    def _paused(self) -> StoreError | None:
        """Why the store is not asked now."""
        return self._outage if self._clock() < self._asked_again_at_s else None

    def _pause(self, reason: str) -> None:
        self._outage = StoreError(f"the store does not answer: {reason}")
        self._asked_again_at_s = self._clock() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def _answers(self) -> None:
        self._outage, self._pause_s, self._asked_again_at_s = None, _FIRST_PAUSE_S, 0.0
