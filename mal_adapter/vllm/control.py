"""What the session routes ask a worker to do. It runs between two steps of the engine."""

import contextlib
import dataclasses
import logging
from typing import Any

import torch

from mal_adapter.errors import (
    ConfigError,
    MalAdapterError,
    SessionConflictError,
    SessionError,
    StateFormatError,
    StateMismatchError,
    StoreError,
)
from mal_adapter.memory.state import MemoryState
from mal_adapter.stores import InMemoryStore
from mal_adapter.stores.states import SessionStates
from mal_adapter.vllm.memory import EngineMemory
from mal_adapter.vllm.turns import check_id

__all__ = ["Control"]

log = logging.getLogger("vllm.mal_adapter")

Answer = tuple[int, Any]
"""An HTTP status and a value that JSON or, for a state's bytes, HTTP can carry."""

_STATUS: dict[type[Exception], int] = {
    SessionError: 400,
    ConfigError: 400,
    StateFormatError: 422,
    StateMismatchError: 422,
    SessionConflictError: 409,
    StoreError: 503,
}
_CALLS = ("stats", "list", "look", "fork", "download", "upload", "drop")


class Control:
    """The sessions of one engine, from outside of its steps. No method raises.

    Other ranks than 0 answer (200, None): they hold no sessions.
    """

    def __init__(self, memory: EngineMemory) -> None:
        self._memory = memory

    def call(self, name: str, *args: Any) -> Answer:
        """Call one of `stats`, `list`, `look`, `fork`, `download`, `upload` and `drop`.

        Returns:
            An HTTP status, and the value or the message of the error.
        """
        if name not in _CALLS:
            return 400, f"{name!r} is none of {', '.join(_CALLS)}"
        try:
            if name in ("fork", "upload", "drop"):  # on all ranks
                self._memory.forget(args[1] if name == "fork" else args[0])
            states = self._memory.sessions.states
            return (200, None) if states is None else getattr(self, f"_{name}")(states, *args)
        except Exception as error:
            status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 500)
            if status == 500:
                log.error("%s: %s", name, error, exc_info=error)
            return status, str(error) if isinstance(error, MalAdapterError) else f"{type(error).__name__}: {error}"

    def flush(self) -> None:
        """Save all unsaved states; what can't be saved is logged."""
        states = self._memory.sessions.states
        while states is not None and states.unsaved:
            try:
                states.flush()
            except SessionConflictError as error:  # of one session; continue with the others
                log.error("another engine has continued a session, and the state of this engine is lost: %s", error)
            except Exception as error:
                log.error("the last utterances of the sessions %s are lost: %s", states.unsaved, error)
                return

    def _stats(self, states: SessionStates) -> Answer:
        outage, store = states.outage, states.store
        return 200, {
            **dataclasses.asdict(self._memory.counters),
            "requests": self._memory.requests,
            "sessions": len(store) if isinstance(store, InMemoryStore) else None,  # others would list all files or keys
            "sessions_unsaved": 0 if outage is None else outage.sessions,
            "states_lost": states.backlog.lost,
            "outage": None if outage is None else outage.error,
        }

    def _list(self, states: SessionStates, limit: int = 1000) -> Answer:
        ids = sorted(states)
        return 200, {"sessions": ids[:limit], "total": len(ids)}

    def _look(self, states: SessionStates, session_id: str) -> Answer:
        state = states.get(session_id)
        last = self._memory.outcomes.get(session_id)
        if state is None:
            return _missing(session_id)
        counters = {name: int(getattr(state, name)) for name in ("utterances", "tokens", "skipped_writes")}
        return 200, {
            "session": session_id,
            **counters,
            "next_turn": counters["utterances"] + counters["skipped_writes"],
            "saved": session_id not in states.unsaved,
            "last": None if last is None else dataclasses.asdict(last),
        }

    def _fork(self, states: SessionStates, session_id: str, new_id: str) -> Answer:
        state = states.get(session_id)
        if state is None:
            return _missing(session_id)
        if check_id(new_id) in states:
            return 409, f"session {new_id!r} exists; delete it first, or choose another id"
        states[new_id] = state.clone()
        return self._look(states, new_id)

    def _download(self, states: SessionStates, session_id: str) -> Answer:
        state = states.get(session_id)
        return _missing(session_id) if state is None else (200, state.to_bytes())

    def _upload(self, states: SessionStates, session_id: str, data: bytes) -> Answer:
        check_id(session_id)
        state = MemoryState.from_bytes(data)
        if not all(bool(torch.isfinite(t).all()) for t in state.tensors.values()):
            return 422, "the state has numbers that are not finite; send one that was downloaded"
        states[session_id] = state
        return self._look(states, session_id)

    def _drop(self, states: SessionStates, session_id: str) -> Answer:
        with contextlib.suppress(KeyError):
            del states[session_id]
            return 200, {"session": session_id, "dropped": True}
        return _missing(session_id)


def _missing(session_id: str) -> Answer:
    return 404, f"session {session_id[:80]!r} does not exist or has expired"
