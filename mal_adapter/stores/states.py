"""The states of all dialogues: those in the store, and those that the store could not save."""

import hashlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn
from weakref import WeakValueDictionary

from mal_adapter.errors import CopyError, SessionConflictError, SessionError, StoreError, UnsavedSessionWarning
from mal_adapter.memory.state import MemoryState
from mal_adapter.stores.base import SessionStore, encode_session_id
from mal_adapter.stores.forking import renew_after_fork
from mal_adapter.stores.unsaved import GIVE_UP_AFTER, Backlog, Outage

__all__ = ["SessionStates"]

log = logging.getLogger(__name__)


class SessionStates(MutableMapping[str, MemoryState]):
    """The states of all dialogues by session id, each of batch size 1 and detached.

    Setting a state checks that it fits the adapter. Copy a state to fork a dialogue; delete it to forget a dialogue.

    If the store can't be reached, states stay in this process, within the limits of `backlog`, and their sessions
    continue from them. A thread saves them soon after the store is back; so does the next utterance of a session, and
    `flush`, which you should call before the process ends.

    Args:
        store: Where the states are saved.
        check: Called with each state that is set; raises if the state does not fit.

    Attributes:
        backlog: The unsaved states: the limits `max_sessions` and `max_bytes`, and how many states were `lost`, since
            another process continued their sessions meanwhile. Each lost state is logged as an error.

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
        self._versions: dict[str, str | None] = {}  # of the open sessions
        self._renew_locks()
        renew_after_fork(self)
        self.backlog = Backlog(self, _save_in_background)

    @property
    def unsaved(self) -> list[str]:
        """The ids of sessions whose last state is only in this process."""
        return self.backlog.ids()

    @property
    def outage(self) -> Outage | None:
        """How many states are unsaved, since when, the last error and the time of the next attempt; None if all are
        saved."""
        return self.backlog.outage()

    def __getitem__(self, session_id: str) -> MemoryState:
        state, _ = self._find(session_id)
        if state is None:
            raise KeyError(session_id)
        return state

    def __setitem__(self, session_id: str, state: MemoryState) -> None:
        encode_session_id(session_id)  # raises if it is not valid
        given: object = state
        if not isinstance(given, MemoryState):
            kind = type(given).__name__
            raise SessionError(f"a session's state is a MemoryState, not a {kind}; MemoryState.load reads a file")
        self._check(state)
        if state.batch_size != 1:
            raise SessionError(f"a session's state has batch size 1, this one {state.batch_size}; split() it")
        self._must_be_closed(session_id, "set its state before the block, or after it")
        with self._one_at_a_time(session_id):
            stored = self.store.get(session_id)
            self.store.put(session_id, state.detach(), None if stored is None else stored.version)
            self.backlog.pop(session_id)

    def __delitem__(self, session_id: str) -> None:
        self._must_be_closed(session_id, "drop it after its block")
        with self._one_at_a_time(session_id):
            dropped = self.store.drop(session_id)
            if self.backlog.pop(session_id) is None and not dropped:
                raise KeyError(session_id)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self.store, *self.unsaved)))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        waiting = f"{len(self.backlog)} unsaved"
        if (outage := self.outage) is not None:
            waiting += f" for {outage.for_s:.0f} s, next try in {outage.next_try_s:.0f} s"
        lost = f", {self.backlog.lost} lost" if self.backlog.lost else ""
        return f"SessionStates({self.store!r}, {len(self._versions)} open, {waiting}{lost})"

    def __getstate__(self) -> NoReturn:
        raise CopyError(
            "the sessions of a memory belong to this process and its model, and can't be pickled or deep-copied; a "
            "single state can: memory.states[id]. In another process call "
            "attach_memory(model, adapter=…, store=…) with the adapter's folder and the path or URL of the store"
        )

    def forget(self, session_ids: Iterable[str]) -> None:
        """Delete those of these sessions that exist; unlike `pop`, without reading their states.

        Raises:
            SessionError: One of them is open.
            StoreError: The store can't be reached.
        """
        for session_id in session_ids:
            with suppress(KeyError):
                del self[session_id]

    def clear(self) -> None:
        """Delete all sessions."""
        self.forget(list(self))

    def flush(self) -> None:
        """Save all unsaved states now. Call it before the process ends. Sessions that are open are saved by their
        blocks, with the next utterance or at the end.

        Raises:
            StoreError: At least one session can't be saved. The others are saved, unless several in a row failed.
                Unsaved states stay in this process.
            SessionConflictError: Another process has continued one of these sessions. Its state stays in the store;
                this process's state is the error's `state`. Call flush again for the others.
        """
        failure: Exception | None = None
        in_a_row = 0
        for session_id in self.unsaved:
            try:
                self._save_again(session_id)
                in_a_row = 0
            except SessionConflictError:
                raise
            except Exception as error:  # of one session; the others are still saved
                failure = error
                if (in_a_row := in_a_row + 1) == GIVE_UP_AFTER:
                    break
        if failure is not None:
            raise failure

    @contextmanager
    def opened(self, session_ids: Sequence[str], *, save_at_end: bool = True) -> Iterator[dict[str, MemoryState]]:
        """Open `session_ids` for one block at a time: two threads that continue one dialogue would lose an update.
        Yields the states of those that exist.

        Args:
            session_ids: Distinct ids.
            save_at_end: Try once more to save what `keep` could not save. An engine that serves others meanwhile leaves
                that to the backlog's thread.

        Raises:
            SessionError: One of them is open already.
            StateFormatError: A stored state is damaged.
            SessionConflictError: Another process has continued one of the unsaved sessions.
            StoreError: The store can't be reached when the block begins, or still not when it ends.
        """
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
            for session_id in session_ids if save_at_end else ():
                if (unsaved := self.backlog.get(session_id)) is not None:
                    self._save(session_id, unsaved.state, unsaved.version)
        finally:
            with self._lock:
                for session_id in session_ids:
                    del self._versions[session_id]

    def keep(self, states: Mapping[str, MemoryState], *, outage: StoreError | None = None) -> None:
        """Save new states of open sessions, without checking them. If the store can't be reached, this only warns,
        since the host has answered: the end of the block tries again, and raises.

        Args:
            states: By session id.
            outage: Why the store is known not to answer now; then it is not asked, and the backlog's thread saves the
                states later.

        Raises:
            SessionConflictError: Another process has continued one of the sessions; the others are saved.
            StoreError: The store can't be reached, and this process has no room for a state; the others are kept.
        """
        error: Exception | None = None
        reason, unsaved = None, []
        for session_id, state in states.items():
            try:
                self._versions[session_id] = self._save(session_id, state, self._versions[session_id], outage)
            except SessionConflictError as conflict:
                error = conflict
            except StoreError as failure:
                if session_id in self.backlog:
                    reason = failure
                    unsaved.append(session_id)
                else:
                    error = error or failure
        if reason is not None:
            message = f"{', '.join(map(repr, unsaved))} kept in this process only: {reason}"
            warnings.warn(message, UnsavedSessionWarning, stacklevel=2)
        if error is not None:
            raise error

    def _find(self, session_id: str) -> tuple[MemoryState | None, str | None]:
        if (unsaved := self.backlog.get(session_id)) is not None:
            return unsaved.state, unsaved.version
        stored = self.store.get(session_id)
        return (None, None) if stored is None else stored

    def _save(self, session_id: str, state: MemoryState, version: str | None, outage: StoreError | None = None) -> str:
        with self._one_at_a_time(session_id):
            try:
                if outage is not None:
                    raise outage
                version = self._put(session_id, state, version)
            except SessionConflictError as error:
                self.backlog.pop(session_id)
                error.state = state
                raise
            except StoreError as error:
                self.backlog.put(session_id, state, version, _digest(state), error)
                raise
            self.backlog.pop(session_id)
        self.backlog.store_answers()
        return version

    def _save_again(self, session_id: str) -> None:
        """Save the unsaved state of a session unless it is open. A block may open the session meanwhile: it continues
        from the unsaved state, and its own save recognizes by digest that this state is already in the store."""
        with self._one_at_a_time(session_id):
            unsaved = self.backlog.get(session_id)
            if unsaved is None:
                return
            if session_id in self._versions:
                self.backlog.postpone(session_id)
                return
            try:
                self._put(session_id, unsaved.state, unsaved.version)
            except SessionConflictError as error:
                if self._forget_unless_open(session_id):
                    error.state = unsaved.state
                    raise
                return
            except Exception as error:
                self.backlog.failed_again(session_id, error)
                raise
            self._forget_unless_open(session_id)
        self.backlog.store_answers()

    def _put(self, session_id: str, state: MemoryState, version: str | None) -> str:
        before = self.backlog.get(session_id)
        if before is not None:
            stored = self.store.get(session_id)
            if stored is not None and _digest(stored.state) in before.attempts:
                version = stored.version  # it was saved, and only the answer was lost
        return self.store.put(session_id, state, version)

    def _forget_unless_open(self, session_id: str) -> bool:
        with self._lock:
            if session_id in self._versions:
                self.backlog.postpone(session_id)
                return False
            self.backlog.pop(session_id)
            return True

    @contextmanager
    def _one_at_a_time(self, session_id: str) -> Iterator[None]:
        with self._lock:
            lock = self._saving.setdefault(session_id, threading.Lock())
        with lock:
            yield

    def _renew_locks(self) -> None:
        self._lock = threading.Lock()
        # A forward, a block's end, a flush and the backlog's thread save states: per session one at a time.
        self._saving: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    def _must_be_closed(self, session_id: str, remedy: str) -> None:
        if session_id in self._versions:
            raise SessionError(f"session {session_id!r} is open; {remedy}")


def _save_in_background(states: object, session_id: str) -> None:
    """One attempt of the backlog's thread. It has no caller to raise to, so it logs lost states."""
    assert isinstance(states, SessionStates)
    try:
        states._save_again(session_id)
    except SessionConflictError as error:
        states.backlog.lost += 1
        log.error(
            "another process has continued session %r while its state of %d utterances was unsaved here; that state "
            "is lost: %s",
            session_id,
            int(error.state.utterances),
            error,
        )


def _digest(state: MemoryState) -> bytes:
    return hashlib.sha256(state.to_bytes()).digest()
