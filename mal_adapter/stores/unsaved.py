"""States that a store could not save: kept in this process within limits, and saved again later."""

import contextlib
import dataclasses
import random
import threading
import weakref
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

from mal_adapter.errors import StoreError
from mal_adapter.memory.state import MemoryState
from mal_adapter.stores.forking import renew_after_fork

__all__ = ["GIVE_UP_AFTER", "Backlog", "Outage", "Unsaved"]

FIRST_S, LONGEST_S = 0.5, 30.0  # between two attempts; doubled each time, and shortened at random by up to a half
GIVE_UP_AFTER = 3  # failures in a row: the store can't be reached, and a round of attempts ends


@dataclasses.dataclass(frozen=True)
class Unsaved:
    """A state that a store failed to save.

    Attributes:
        state: Of batch size 1 and detached.
        version: The version before it.
        attempts: Digests of all states of this session that the store failed to save since, including this one.
        nbytes: Of the state's tensors.
        since_s: Time of the first failure, on a monotonic clock.
        due_s: Time of the next attempt, on that clock.
        failures: How many further attempts failed.
        stuck: Whether it failed again although the store saved another session just before.
    """

    state: MemoryState
    version: str | None
    attempts: frozenset[bytes]
    nbytes: int
    since_s: float
    due_s: float
    failures: int = 0
    stuck: bool = False


class Outage(NamedTuple):
    """The states that are unsaved now.

    Attributes:
        sessions: How many sessions have their last state only in this process.
        nbytes: Bytes of those states.
        for_s: Seconds since the first of them could not be saved.
        next_try_s: Seconds until the next attempt; 0 while one is under way.
        error: The last error of the store.
    """

    sessions: int
    nbytes: int
    for_s: float
    next_try_s: float
    error: str


class Backlog:
    """The states that a store could not save, by session id, and a thread that saves them.

    Attempts are made one at a time: after half a second, then with growing delays, and immediately when the store has
    saved a state of any other session. A session that fails again while others are saved has a delay of its own, and
    delays no other. The thread ends after the last state, with `owner`, or with the process.

    Args:
        owner: The owner of the states. The thread has a weak reference to it.
        attempt: A method of the owner that saves one session by its id, and raises the store's errors.

    Attributes:
        max_sessions: The largest number of unsaved sessions.
        max_bytes: The largest number of bytes of unsaved tensors.
        lost: How many states were lost, since another process had continued their sessions.
    """

    def __init__(self, owner: object, attempt: Callable[[object, str], None]) -> None:
        self.max_sessions = 1024
        self.max_bytes = 2**30
        self.lost = 0
        self._clock = monotonic  # tests replace it
        self._owner = weakref.ref(owner)
        self._attempt = attempt
        self._records: dict[str, Unsaved] = {}  # the next attempt is of the first
        self._error = ""
        self._answered = False  # whether the last attempt, of any session, succeeded
        self._failed_in_a_row = 0  # also over several rounds: due times differ, and a round may have one session
        self._failed_rounds = 0
        self._pause_until_s = 0.0  # after a round that gave up
        self._renew_locks()
        renew_after_fork(self)
        weakref.finalize(owner, self._end).atexit = False

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._records

    def ids(self) -> list[str]:
        """The ids of the unsaved sessions, sorted."""
        with self._lock:
            return sorted(self._records)

    def get(self, session_id: str) -> Unsaved | None:
        """The unsaved state of a session."""
        return self._records.get(session_id)

    def pop(self, session_id: str) -> Unsaved | None:
        """Remove a session: it is saved, deleted or lost."""
        with self._lock:
            record = self._records.pop(session_id, None)
            if record is not None and not self._records:
                self._wake.set()  # so that the thread ends
            return record

    def put(self, session_id: str, state: MemoryState, version: str | None, digest: bytes, error: Exception) -> None:
        """Add a state that the store failed to save.

        Raises:
            StoreError: There is no room for one more session. The other sessions stay.
        """
        with self._lock:
            now, before = self._clock(), self._records.get(session_id)
            nbytes = state.nbytes
            too_large = self._nbytes() + nbytes > self.max_bytes
            if before is None and (len(self._records) >= self.max_sessions or too_large):
                raise StoreError(
                    f"{error}; and this process has no room for more than {len(self._records)} unsaved sessions "
                    f"(memory.states.backlog). This utterance of {session_id!r} is not kept; open the session again "
                    "and repeat it when the store is back"
                ) from error
            self._answered, self._error = False, str(error)
            if before is None:
                self._records[session_id] = Unsaved(state, version, frozenset({digest}), nbytes, now, now + _delay(0))
            else:
                attempts = before.attempts | {digest}
                self._records[session_id] = dataclasses.replace(
                    before, state=state, version=version, attempts=attempts, nbytes=nbytes
                )
            self._start()

    def failed_again(self, session_id: str, error: Exception) -> None:
        """The store failed to save it again; the other sessions come first."""
        with self._lock:
            if (record := self._records.pop(session_id, None)) is not None:
                due_s, stuck = self._clock() + _delay(record.failures), self._answered
                self._records[session_id] = dataclasses.replace(
                    record, failures=record.failures + 1, due_s=due_s, stuck=stuck
                )
            self._answered, self._error = False, str(error)

    def postpone(self, session_id: str) -> None:
        """The session is open and saved by its block, so its next attempt is after another delay."""
        with self._lock:
            if (record := self._records.get(session_id)) is not None:
                due_s = self._clock() + _delay(record.failures)
                self._records[session_id] = dataclasses.replace(record, due_s=due_s)

    def store_answers(self) -> None:
        """The store has saved a state of any session, so the others are due now."""
        with self._lock:
            self._answered, self._failed_in_a_row, self._failed_rounds, self._pause_until_s = True, 0, 0, 0.0
            now = self._clock()
            for session_id, record in self._records.items():
                if not record.stuck and record.due_s > now:
                    self._records[session_id] = dataclasses.replace(record, due_s=now)
            if self._records:
                self._wake.set()

    def outage(self) -> Outage | None:
        """The unsaved states, and since when; None if there are none."""
        with self._lock:
            if not self._records:
                return None
            for_s = self._clock() - min(record.since_s for record in self._records.values())
            return Outage(len(self._records), self._nbytes(), for_s, self._wait_s(), self._error)

    def full(self) -> bool:
        """Whether there is no room for another session."""
        with self._lock:
            return len(self._records) >= self.max_sessions or self._nbytes() >= self.max_bytes

    def _renew_locks(self) -> None:
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def _end(self) -> None:
        self._wake.set()

    def _nbytes(self) -> int:
        return sum(record.nbytes for record in self._records.values())

    def _start(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            return
        self._thread = threading.Thread(target=_save_all, args=(self._owner, self), name="mal_adapter", daemon=True)
        with contextlib.suppress(RuntimeError):  # the interpreter is ending
            self._thread.start()

    def _round(self, owner: object) -> float | None:
        """Attempt all sessions that are due. Returns seconds until the next attempt; None if all are saved."""
        with self._lock:
            now = self._clock()
            due = [session_id for session_id, record in self._records.items() if record.due_s <= now]
        for session_id in due if now >= self._pause_until_s else ():
            try:
                self._attempt(owner, session_id)
                self._failed_in_a_row = 0
            except Exception:  # it is in failed_again, and this thread must continue
                self._failed_in_a_row += 1
            if self._failed_in_a_row == GIVE_UP_AFTER:
                with self._lock:
                    self._pause_until_s = self._clock() + _delay(self._failed_rounds)
                    self._failed_rounds += 1
                    self._failed_in_a_row = 0
                break
        with self._lock:
            if not self._records:
                self._thread = None
                return None
            return self._wait_s()

    def _wait_s(self) -> float:
        first_due_s = min(record.due_s for record in self._records.values())
        return max(0.0, max(first_due_s, self._pause_until_s) - self._clock())


def _delay(failures: int) -> float:
    # Shortened at random, or all replicas would try at the same time.
    return float(min(LONGEST_S, FIRST_S * 2 ** min(failures, 16)) * random.uniform(0.5, 1.0))


def _save_all(reference: "weakref.ref[object]", backlog: Backlog) -> None:
    while (owner := reference()) is not None:
        wait_s = backlog._round(owner)
        del owner  # it may be deleted while this thread waits
        if wait_s is None:
            return
        backlog._wake.wait(wait_s)
        backlog._wake.clear()
