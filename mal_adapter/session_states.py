"""The states of all dialogues, as they lie in a store, and what the store could not keep."""

import dataclasses
import hashlib
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress

from mal_adapter.errors import SessionConflictError, SessionError, StoreError, UnsavedSessionWarning
from mal_adapter.state import MemoryState
from mal_adapter.stores import SessionStore
from mal_adapter.stores.checks import id_bytes

__all__ = ["SessionStates"]


class SessionStates(MutableMapping[str, MemoryState]):
    """The states of all dialogues by session id, each of batch size 1 and detached, as they lie in a store.

    Setting a state checks that it fits the adapter. Copy a state to fork a dialogue; delete it to forget one. What the
    store could not keep while it was out of reach stays in this process, and goes on from there, until it is saved.

    Args:
        store: Where the states lie.
        check: Called with each state that is set; raises if the state does not fit.

    Example:
        >>> from mal_adapter import MemoryAdapter, MemoryConfig
        >>> from mal_adapter.stores import InMemoryStore
        >>> adapter = MemoryAdapter(MemoryConfig(hidden_size=32, memory_dim=16)).eval()
        >>> states = SessionStates(InMemoryStore(), adapter.check_state)
        >>> states["call-42"] = adapter.initial_state()
        >>> states["what-if"] = states["call-42"].clone()
        >>> sorted(states)
        ['call-42', 'what-if']
    """

    def __init__(self, store: SessionStore, check: Callable[[MemoryState], None]) -> None:
        self.store = store
        self._check = check
        self._versions: dict[str, str | None] = {}  # of the sessions that are open, as this process knows them
        self._unsaved: dict[str, _Unsaved] = {}
        self._lock = threading.Lock()

    @property
    def unsaved(self) -> list[str]:
        """The sessions whose last state is in this process only."""
        return sorted(self._unsaved)

    def __getitem__(self, session_id: str) -> MemoryState:
        state, _ = self._find(session_id)
        if state is None:
            raise KeyError(session_id)
        return state

    def __setitem__(self, session_id: str, state: MemoryState) -> None:
        id_bytes(session_id)  # raises for what is none
        given: object = state
        if not isinstance(given, MemoryState):
            kind = type(given).__name__
            raise SessionError(f"a session's state is a MemoryState, this is a {kind}; MemoryState.load reads a file")
        self._check(state)
        if state.batch_size != 1:
            raise SessionError(f"a session's state has batch size 1, this one {state.batch_size}; split() it")
        self._must_be_closed(session_id, "set its state before the block, or after it")
        stored = self.store.get(session_id)
        self.store.put(session_id, state.detach(), None if stored is None else stored.version)
        self._unsaved.pop(session_id, None)

    def __delitem__(self, session_id: str) -> None:
        self._must_be_closed(session_id, "drop it after its block")
        dropped = self.store.drop(session_id)
        if self._unsaved.pop(session_id, None) is None and not dropped:
            raise KeyError(session_id)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self.store, *self._unsaved)))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"SessionStates({self.store!r}, {len(self._versions)} open, {len(self._unsaved)} unsaved)"

    def forget(self, session_ids: Iterable[str]) -> None:
        """Drop these sessions, those that there are; unlike `pop`, without reading what they hold."""
        for session_id in session_ids:
            with suppress(KeyError):
                del self[session_id]

    def clear(self) -> None:
        """Forget every session."""
        self.forget(list(self))

    def flush(self) -> None:
        """Save what the store could not keep when it was written. Sessions that are open are left to their blocks,
        which save them with the next utterance or at the end.

        Raises:
            StoreError: The store is still out of reach; the states stay in this process.
            SessionConflictError: Another process has continued one of these sessions. Its state stays, this process's
                is the error's `state`; flush again for the others.
        """
        for session_id in self.unsaved:
            # Held, since a block would overwrite, or be in conflict with, what is saved behind its back.
            with suppress(SessionError), self.opened([session_id]):
                pass

    @contextmanager
    def opened(self, session_ids: Sequence[str]) -> Iterator[dict[str, MemoryState]]:
        """Hold `session_ids` for one session at a time: a dialogue that two threads continue would lose an update.
        Gives the states of those that have one."""
        with self._lock:
            if busy := self._versions.keys() & set(session_ids):
                raise SessionError(f"sessions {sorted(busy)} are open in another block, thread or task; wait for it")
            self._versions.update(dict.fromkeys(session_ids))
        try:
            found = {}
            for session_id in session_ids:
                state, self._versions[session_id] = self._find(session_id)
                if state is not None:
                    found[session_id] = state
            yield found
            for session_id in self._unsaved.keys() & set(session_ids):
                self._save_again(session_id)
        finally:
            with self._lock:
                for session_id in session_ids:
                    del self._versions[session_id]

    def keep(self, states: Mapping[str, MemoryState]) -> None:
        """Save the states that open sessions have reached; unchecked, for the session itself. A store that is out of
        reach is no error here, since the host has answered: the block's end tries again, and raises.

        Raises:
            SessionConflictError: Another process has continued one of the sessions; the others are saved.
        """
        conflict, outage, unsaved = None, None, []
        for session_id, state in states.items():
            try:
                self._versions[session_id] = self._save(session_id, state, self._versions[session_id])
            except SessionConflictError as error:
                conflict = error
            except StoreError as error:
                outage = error
                unsaved.append(session_id)
        if outage is not None:
            message = f"{', '.join(map(repr, unsaved))} kept in this process only: {outage}"
            warnings.warn(message, UnsavedSessionWarning, stacklevel=2)
        if conflict is not None:
            raise conflict

    def _save_again(self, session_id: str) -> None:
        unsaved = self._unsaved[session_id]
        self._save(session_id, unsaved.state, unsaved.version)

    def _find(self, session_id: str) -> tuple[MemoryState | None, str | None]:
        if (unsaved := self._unsaved.get(session_id)) is not None:
            return unsaved.state, unsaved.version
        stored = self.store.get(session_id)
        return (None, None) if stored is None else stored

    def _save(self, session_id: str, state: MemoryState, version: str | None) -> str:
        before = self._unsaved.get(session_id)
        attempts = set() if before is None else before.attempts
        try:
            if attempts and (stored := self.store.get(session_id)) is not None and _digest(stored.state) in attempts:
                version = stored.version  # it had arrived, and only the answer was lost
            version = self.store.put(session_id, state, version)
        except SessionConflictError as error:
            self._unsaved.pop(session_id, None)
            error.state = state
            raise
        except StoreError:
            self._unsaved[session_id] = _Unsaved(state, version, attempts | {_digest(state)})
            raise
        self._unsaved.pop(session_id, None)
        return version

    def _must_be_closed(self, session_id: str, remedy: str) -> None:
        if session_id in self._versions:
            raise SessionError(f"session {session_id!r} is open; {remedy}")


@dataclasses.dataclass(frozen=True)
class _Unsaved:
    """A state that a store failed to keep, the version it follows, and digests of all that it failed to keep since."""

    state: MemoryState
    version: str | None
    attempts: set[bytes]


def _digest(state: MemoryState) -> bytes:
    return hashlib.sha256(state.to_bytes()).digest()
