"""States left unsaved by an outage of the store are saved soon after it by a thread, within bounds, and visibly."""

import contextlib
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from mal_adapter import MemoryState
from mal_adapter.errors import SessionConflictError, StoreError, UnsavedSessionWarning
from mal_adapter.stores import InMemoryStore, unsaved
from mal_adapter.stores.base import Stored
from mal_adapter.stores.states import SessionStates
from tests.stores.servers import wait_until
from tests.stores.states import state_of

pytestmark = pytest.mark.filterwarnings("ignore::mal_adapter.errors.UnsavedSessionWarning")


class Faulty(InMemoryStore):
    """A store that may be away for writing, for reading too, or for some sessions only; counts the attempts."""

    def __init__(self) -> None:
        super().__init__(max_sessions=None)
        self.away = self.unreadable = False
        self.broken: set[str] = set()
        self.attempts: Counter[str] = Counter()
        self.reads = 0
        self.threads: dict[str, str] = {}
        self.hold: threading.Event | None = None
        self.holding = threading.Event()

    def get(self, session_id: str) -> Stored | None:
        self.reads += 1
        if self.unreadable:
            raise StoreError("can't read sessions: nobody answers")
        return super().get(session_id)

    def put(self, session_id: str, state: MemoryState, version: str | None = None) -> str:
        self.attempts[session_id] += 1
        self.threads[session_id] = threading.current_thread().name
        if self.hold is not None and threading.current_thread().name == "mal_adapter":
            self.holding.set()
            assert self.hold.wait(20)
        if self.away or self.unreadable or session_id in self.broken:
            raise StoreError("can't write sessions: this is a replica")
        return super().put(session_id, state, version)


@pytest.fixture
def store() -> Faulty:
    return Faulty()


@pytest.fixture
def states(store: Faulty) -> Iterator[SessionStates]:
    states = SessionStates(store, lambda _: None)
    yield states
    store.away = store.unreadable = False
    store.broken.clear()
    with contextlib.suppress(SessionConflictError):
        states.flush()
    wait_until(lambda: worker() is None)  # it ends with the last state


@pytest.fixture
def no_timed_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No attempt is due by time during a test; only a saved session wakes the thread."""
    monkeypatch.setattr(unsaved, "FIRST_S", 3600.0)
    monkeypatch.setattr(unsaved, "LONGEST_S", 3600.0)


@pytest.fixture
def rounds(states: SessionStates, monkeypatch: pytest.MonkeyPatch) -> "Rounds":
    """Attempts are made by the test, at times of a clock that the test sets; there is no thread."""
    monkeypatch.setattr(unsaved, "_save_all", lambda *_: None)
    return Rounds(states)


class Rounds:
    """What the backlog's thread does, at a simulated time."""

    def __init__(self, states: SessionStates) -> None:
        self.states, self.now_s = states, 0.0
        states.backlog._clock = lambda: self.now_s

    def run(self, seconds: float) -> None:
        """Make all attempts that are due within the next `seconds`."""
        end_s = self.now_s + seconds
        while (wait_s := self.states.backlog._round(self.states)) is not None and self.now_s + wait_s <= end_s:
            self.now_s += wait_s
        self.now_s = end_s


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsaved, "FIRST_S", 0.02)
    monkeypatch.setattr(unsaved, "LONGEST_S", 0.1)


def speak(states: SessionStates, session_id: str, utterances: int = 1) -> None:
    """A block in which a session reaches a state, as the recogniser opens one: an outage is no error to the caller."""
    with contextlib.suppress(StoreError), states.opened([session_id]):
        states.keep({session_id: state_of(utterances)})


def nothing_unsaved(states: SessionStates) -> bool:
    return states.unsaved == [] and states.outage is None


def worker() -> threading.Thread | None:
    return next((thread for thread in threading.enumerate() if thread.name == "mal_adapter"), None)


@pytest.mark.usefixtures("no_timed_attempts")
def test_unsaved_sessions_are_saved_when_another_session_is_saved(store: Faulty, states: SessionStates):
    store.away = True
    for n in range(50):
        speak(states, f"ended-{n}", n + 1)
    assert len(states.unsaved) == 50
    store.away = False
    speak(states, "other")
    wait_until(lambda: nothing_unsaved(states))
    for n in range(50):
        assert store.get(f"ended-{n}").state.equals(state_of(n + 1))
        assert store.threads[f"ended-{n}"] == "mal_adapter", "not in the time of a request"
    assert store.threads["other"] == threading.current_thread().name
    wait_until(lambda: worker() is None)  # it ends with what it was for


@pytest.mark.usefixtures("soon")
def test_without_traffic_a_session_is_saved_when_the_store_is_back(store: Faulty, states: SessionStates):
    store.away = True
    speak(states, "call", 3)
    store.unreadable = True
    reads = store.reads
    wait_until(lambda: store.reads > reads + 2)
    assert states.unsaved == ["call"]
    assert states["call"].equals(state_of(3)), "it continues from the state in this process"
    store.away = store.unreadable = False
    wait_until(lambda: nothing_unsaved(states))
    assert store.get("call").state.equals(state_of(3))
    store.away = True  # and a second outage is noticed like the first
    speak(states, "call", 4)
    store.away = False
    wait_until(lambda: nothing_unsaved(states))
    assert store.get("call").state.equals(state_of(4))


def test_while_a_store_is_away_few_of_many_sessions_are_tried(store: Faulty, states: SessionStates, rounds: Rounds):
    store.away = True
    for n in range(200):
        speak(states, str(n))
    store.attempts.clear()
    rounds.run(3600)
    # Three in a row, after 0.5, 1, 2, ... 30 s or up to a half less: at most one round in 15 s, and six before that.
    assert 3 * 3600 / 30 <= store.attempts.total() <= 3 * (3600 / 15 + 6)


def test_a_session_that_always_fails_delays_no_other_and_is_tried_less_and_less_often(
    store: Faulty, states: SessionStates, rounds: Rounds
):
    store.broken = {f"broken-{n}" for n in range(5)}
    store.away = True
    for session_id in (*sorted(store.broken), *map(str, range(20))):
        speak(states, session_id)
    store.away = False
    speak(states, "other")
    rounds.run(60)
    assert set(states.unsaved) == store.broken
    store.attempts.clear()
    for n in range(3600):
        speak(states, f"traffic {n}")
        rounds.run(1)
    attempts = [store.attempts[session_id] for session_id in store.broken]
    assert 3600 / 31 <= min(attempts) <= max(attempts) <= 3600 / 15 + 6
    store.broken.clear()
    states.flush()
    assert nothing_unsaved(states)


@pytest.mark.usefixtures("no_timed_attempts")
def test_flush_saves_the_others_of_a_session_that_fails(store: Faulty, states: SessionStates):
    store.away = True
    for session_id in ("a", "b", "c", "d"):
        speak(states, session_id)
    store.away, store.broken = False, {"a", "c"}
    with pytest.raises(StoreError, match="replica"):
        states.flush()
    assert states.unsaved == ["a", "c"]
    store.broken = {str(n) for n in range(9)} | {"a", "c"}
    for n in range(9):
        speak(states, str(n))
    store.attempts.clear()
    with pytest.raises(StoreError):
        states.flush()
    assert store.attempts.total() == unsaved.GIVE_UP_AFTER, "a shutdown does not wait for all of them"


@pytest.mark.usefixtures("no_timed_attempts")
def test_a_state_whose_session_another_process_continued_is_lost_logged_and_counted(
    store: Faulty, states: SessionStates, caplog: pytest.LogCaptureFixture
):
    speak(states, "call", 1)
    store.away = True
    speak(states, "call", 2)
    speak(states, "ended", 5)
    store.away = False
    theirs = store.put("call", state_of(7), store.get("call").version)
    with caplog.at_level(logging.ERROR):
        speak(states, "other")
        wait_until(lambda: nothing_unsaved(states))
    assert store.get("call").version == theirs
    assert store.get("ended").state.equals(state_of(5)), "a conflict of one session delays no other"
    assert states.backlog.lost == 1
    assert "1 lost" in repr(states)
    (record,) = caplog.records
    assert "'call'" in record.getMessage()
    assert "2 utterances" in record.getMessage()
    assert states["call"].equals(state_of(7))


@pytest.mark.usefixtures("no_timed_attempts")
def test_a_block_that_opens_while_its_session_is_being_saved_neither_waits_nor_conflicts(
    store: Faulty, states: SessionStates
):
    speak(states, "call", 1)
    store.away = True
    speak(states, "call", 2)
    store.away, store.hold = False, threading.Event()
    speak(states, "other")
    assert store.holding.wait(20)
    with states.opened(["call"]) as found:
        assert found["call"].equals(state_of(2))
        store.hold.set()
        states.keep({"call": state_of(3)})
        states.keep({"call": state_of(4)})
    assert store.get("call").state.equals(state_of(4))
    wait_until(lambda: nothing_unsaved(states))
    assert store.get("call").state.equals(state_of(4))
    assert states.backlog.lost == 0


@pytest.mark.usefixtures("no_timed_attempts")
@pytest.mark.parametrize("how", ["deleted", "set", "only read"])
def test_a_change_of_a_session_that_is_being_saved_waits_for_it(store: Faulty, states: SessionStates, how: str):
    store.away = True
    speak(states, "call", 2)
    store.away, store.hold = False, threading.Event()
    speak(states, "other")
    assert store.holding.wait(20)
    threading.Timer(0.05, store.hold.set).start()
    if how == "deleted":
        del states["call"]
    elif how == "set":
        states["call"] = state_of(9)
    else:
        with states.opened(["call"]) as found:
            assert found["call"].equals(state_of(2))
    wait_until(lambda: nothing_unsaved(states))
    if how == "deleted":
        assert "call" not in states, "it does not return"
    else:
        assert store.get("call").state.equals(state_of(9 if how == "set" else 2))


@pytest.mark.usefixtures("soon")
def test_threads_that_continue_their_sessions_during_outages_lose_nothing(store: Faulty, states: SessionStates):
    done, wrong = threading.Event(), []

    def weather() -> None:
        while not done.wait(0.003):
            store.away = not store.away
        store.away = False

    def call(session_id: str) -> None:
        try:
            for utterance in range(1, 60):
                with contextlib.suppress(StoreError), states.opened([session_id]) as found:
                    before = int(found[session_id].utterances) if session_id in found else 0
                    assert before == utterance - 1
                    states.keep({session_id: state_of(utterance)})
                time.sleep(0.001)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=call, args=(str(n),)) for n in range(6)]
    changing = threading.Thread(target=weather)
    changing.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    changing.join()
    assert wrong == []
    wait_until(lambda: nothing_unsaved(states))
    assert [int(store.get(str(n)).state.utterances) for n in range(6)] == [59] * 6
    assert states.backlog.lost == 0


@pytest.mark.usefixtures("no_timed_attempts")
@pytest.mark.parametrize("bound", ["max_sessions", "max_bytes"])
def test_a_long_outage_is_bounded_in_memory_and_an_utterance_without_room_is_an_error(
    store: Faulty, states: SessionStates, bound: str
):
    speak(states, "old", 6)
    store.away = True
    setattr(states.backlog, bound, 3 if bound == "max_sessions" else 3 * state_of(1).nbytes)
    for n in range(3):
        speak(states, f"in time {n}")
    assert states.backlog.full()
    for session_id in ("late", "old"):
        with pytest.raises(StoreError, match=r"3 unsaved sessions.*not kept"), states.opened([session_id]):
            states.keep({session_id: state_of(7)})
    assert "late" not in states
    assert states["old"].equals(state_of(6)), "as it was"
    speak(states, "in time 0", 2)  # unsaved sessions continue
    assert states["in time 0"].equals(state_of(2))
    batch = {"in time 1": state_of(3), "late": state_of(1)}
    warned = pytest.warns(UnsavedSessionWarning, match="'in time 1' kept")
    refused = pytest.raises(StoreError, match="'late'")
    with contextlib.suppress(StoreError), states.opened(list(batch)), warned, refused:
        states.keep(batch)
    assert states["in time 1"].equals(state_of(3))
    assert states.unsaved == ["in time 0", "in time 1", "in time 2"]
    store.away = False
    states.flush()
    assert not states.backlog.full()
    speak(states, "late")
    assert store.get("late") is not None


@pytest.mark.usefixtures("no_timed_attempts")
def test_an_outage_is_visible(store: Faulty, states: SessionStates):
    assert states.outage is None
    store.away = True
    speak(states, "a")
    speak(states, "b")
    outage = states.outage
    assert (outage.sessions, outage.nbytes) == (2, 2 * state_of(1).nbytes)
    assert 0 <= outage.for_s < 20
    assert 1000 < outage.next_try_s <= 3600
    assert outage.error == "can't write sessions: this is a replica"
    assert "2 unsaved for 0 s, next try in" in repr(states)


def test_the_time_between_attempts_grows_to_a_bound_and_differs_between_replicas():
    delays = [[unsaved._delay(n) for _ in range(50)] for n in range(40)]
    for n, some in enumerate(delays):
        longest = min(30.0, 0.5 * 2**n)
        assert longest / 2 <= min(some) < max(some) <= longest


@pytest.mark.usefixtures("no_timed_attempts")
def test_the_thread_ends_with_its_memory(store: Faulty):
    states = SessionStates(store, lambda _: None)
    store.away = True
    speak(states, "call")
    thread = worker()
    assert thread is not None
    del states
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_a_process_with_unsaved_states_ends():
    code = """
import contextlib, warnings
from tests.test_unsaved import Faulty, SessionStates, speak
warnings.simplefilter("ignore")
store = Faulty()
states = SessionStates(store, lambda _: None)
store.away = True
speak(states, "call")
print(states.unsaved)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "['call']\n"), done.stderr


@pytest.mark.usefixtures("soon")
def test_an_unexpected_error_does_not_end_the_attempts(
    store: Faulty, states: SessionStates, monkeypatch: pytest.MonkeyPatch
):
    """A store of someone's own, with a fault in it."""
    store.away = True
    speak(states, "call")
    with monkeypatch.context() as fault:
        calls = []
        fault.setattr(store, "get", lambda _: calls.append(1) or 1 // 0)
        store.away = False
        wait_until(lambda: len(calls) > 2)
        assert states.unsaved == ["call"]
    wait_until(lambda: nothing_unsaved(states))


def test_a_conflict_of_an_open_session_is_raised_in_its_block(store: Faulty, states: SessionStates, rounds: Rounds):
    speak(states, "call", 1)
    store.away = True
    speak(states, "call", 2)
    store.away = False
    store.put("call", state_of(7), store.get("call").version)
    with states.opened(["call"]):
        speak(states, "other")
        attempts = store.attempts["call"]
        rounds.run(60)
        assert store.attempts["call"] == attempts, "an open session is left to its block"
        assert states.outage.next_try_s > 0, "the thread does not spin meanwhile"
        with pytest.raises(SessionConflictError) as conflict:
            states.keep({"call": state_of(3)})
    assert conflict.value.state.equals(state_of(3))
    assert nothing_unsaved(states)
    assert states.backlog.lost == 0


@pytest.mark.usefixtures("soon")
@pytest.mark.filterwarnings(
    "ignore:This process:DeprecationWarning"
)  # it is multi-threaded, and forks: that is the case
def test_a_forked_process_has_new_locks(store: Faulty, states: SessionStates):
    """As gunicorn's --preload and DataLoader's workers do."""
    state = state_of(1)
    store.hold = threading.Event()
    store.away = True
    speak(states, "call")
    assert store.holding.wait(20)  # the thread holds the session's lock
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        store.hold, store.away = None, False
        with contextlib.suppress(StoreError), states.opened(["call"]):
            states.keep({"call": state})
        states.flush()
        os._exit(0 if sorted(store) == ["call"] and states.unsaved == [] else 1)
    store.hold.set()
    assert os.waitpid(child, 0)[1] == 0
