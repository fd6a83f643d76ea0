"""InMemoryStore stays within its limits, and evicts the least recently used sessions."""

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_adapter.errors import ConfigError, SessionConflictError
from mal_adapter.stores import InMemoryStore
from tests.stores.passing_time import let_time_pass
from tests.stores.states import state_of

STATES = {width: state_of(1, width=width) for width in (1, 2, 3, 5)}
LIMITS = [STATES[w].nbytes * n + d for w in (1, 3) for n in (1, 3) for d in (-1, 0, 1)]


@dataclasses.dataclass
class Slow:
    """What InMemoryStore should do, by going through everything each time."""

    max_sessions: int | None
    ttl_s: float | None
    max_bytes: int | None
    kept: dict[str, dict] = dataclasses.field(default_factory=dict)
    uses: int = 0
    evicted: int = 0

    def purge(self, now: float) -> None:
        self.kept = {k: e for k, e in self.kept.items() if self.ttl_s is None or now - e["at"] < self.ttl_s}

    def use(self, session_id: str, now: float) -> None:
        self.uses += 1
        self.kept[session_id] |= {"at": now, "use": self.uses}

    def put(self, session_id: str, nbytes: int, version: str, now: float) -> None:
        self.kept[session_id] = {"nbytes": nbytes, "version": version}
        self.use(session_id, now)
        while len(self.kept) > 1 and (
            (self.max_sessions is not None and len(self.kept) > self.max_sessions)
            or (self.max_bytes is not None and sum(e["nbytes"] for e in self.kept.values()) > self.max_bytes)
        ):
            del self.kept[min(self.kept, key=lambda k: self.kept[k]["use"])]
            self.evicted += 1


ID = st.sampled_from("abcdef")
STEPS = st.one_of(
    st.tuples(
        st.just("put"), ID, st.sampled_from(sorted(STATES)), st.sampled_from(["right", "right", "stale", "none"])
    ),
    st.tuples(st.just("get"), ID),
    st.tuples(st.just("drop"), ID),
    st.tuples(st.just("list")),
    st.tuples(st.just("wait"), st.sampled_from([0.5, 1.0, 3.0])),
)


@settings(max_examples=300, deadline=None)
@given(
    max_sessions=st.none() | st.integers(1, 4),
    ttl_s=st.none() | st.sampled_from([1.0, 2.5]),
    max_bytes=st.none() | st.sampled_from(LIMITS),
    steps=st.lists(STEPS, max_size=60),
)
def test_it_does_what_a_slow_reference_does(max_sessions, ttl_s, max_bytes, steps):
    now = 100.0
    store, slow = InMemoryStore(max_sessions, ttl_s, max_bytes), Slow(max_sessions, ttl_s, max_bytes)
    store._clock = lambda: now  # so that expiry is exact
    for action, *arguments in steps:
        slow.purge(now)
        if action == "wait":
            now += arguments[0]
        elif action == "list":
            assert sorted(store) == sorted(slow.kept)
        elif action == "drop":
            assert store.drop(arguments[0]) == (slow.kept.pop(arguments[0], None) is not None)
        elif action == "get":
            stored, expected = store.get(arguments[0]), slow.kept.get(arguments[0])
            assert (stored is None) == (expected is None)
            if stored is not None:
                assert stored.version == expected["version"]
                slow.use(arguments[0], now)
        else:
            session_id, width, which = arguments
            there = slow.kept.get(session_id)
            version = {"right": there and there["version"], "stale": "0", "none": None}[which]
            if there is not None and which != "right":
                with pytest.raises(SessionConflictError):
                    store.put(session_id, STATES[width], version)
            else:
                slow.put(session_id, STATES[width].nbytes, store.put(session_id, STATES[width], version), now)
        slow.purge(now)
        assert len(store) == len(slow.kept)
        assert store.evicted == slow.evicted
    assert {k: store.get(k).version for k in list(store)} == {k: e["version"] for k, e in slow.kept.items()}


def test_a_get_is_a_use():
    store = InMemoryStore(max_sessions=2)
    store.put("a", state_of(1))
    store.put("b", state_of(1))
    store.get("a")
    store.put("c", state_of(1))
    assert list(store) == ["a", "c"]


def test_a_get_keeps_a_session_from_expiring():
    store = InMemoryStore(ttl_s=1.0)
    store.put("a", state_of(1))
    store.put("b", state_of(1))
    for _ in range(5):
        let_time_pass(store, 0.3)
        assert store.get("a") is not None
    assert list(store) == ["a"]


def test_the_newest_session_stays_however_large():
    store = InMemoryStore(max_bytes=1)
    store.put("a", state_of(1))
    store.put("b", state_of(2))
    assert list(store) == ["b"]
    assert store.get("b").state.equals(state_of(2))


def test_writing_to_an_evicted_session_starts_a_new_one_but_does_not_replace_another():
    store = InMemoryStore(max_sessions=1)
    version = store.put("a", state_of(1))
    store.put("b", state_of(1))
    assert store.put("a", state_of(2), version) != version
    with pytest.raises(SessionConflictError):
        store.put("a", state_of(3), version)


def test_repr_counts():
    store = InMemoryStore(max_sessions=1)
    store.put("a", state_of(1))
    store.put("b", state_of(1))
    assert repr(store) == f"InMemoryStore(1 sessions, {state_of(1).nbytes} bytes, 1 evicted)"


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "9"], ids=repr)
@pytest.mark.parametrize("name", ["max_sessions", "max_bytes"])
def test_a_limit_that_is_not_a_count_is_refused(name: str, limit: object):
    with pytest.raises(ConfigError, match=name):
        InMemoryStore(**{name: limit})


def resident_kib() -> int:
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmRSS from Linux's /proc")
def test_twenty_thousand_sessions_take_no_more_memory_than_two_thousand():
    """Each has three utterances of 16 KiB states; kept to the end they would take 300 MiB."""
    store = InMemoryStore(max_sessions=256)
    utterances = [state_of(n, width=22) for n in (1, 2, 3)]
    for i in range(20_000):
        version = None
        for state in utterances:
            version = store.put(f"call-{i}", state.clone(), version)
        if i == 2_000 - 1:
            before = resident_kib()
    grown = resident_kib() - before
    print(f"RSS {before} KiB after 2000 sessions, grown by {grown} KiB after 20000")
    assert len(store) == 256
    assert store.evicted == 20_000 - 256
    assert grown < 8 * 1024
