"""The contract of session stores, on every store."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mal_adapter.errors import ConfigError, SessionConflictError, SessionError
from mal_adapter.stores import SessionStore
from tests.stores.passing_time import let_time_pass
from tests.stores.states import count_up, state_of

MakeStore = Callable[..., SessionStore]


@pytest.mark.parametrize("fingerprint", ["adapter-1", None])
def test_a_round_trip_keeps_every_bit(make_store: MakeStore, fingerprint: str | None):
    store, state = make_store(), state_of(14, width=8, fingerprint=fingerprint)
    version = store.put("call", state)
    stored = store.get("call")
    assert stored.state.equals(state)
    assert all(a.equal(b) for a, b in zip(stored.state.momentum, state.momentum, strict=True))
    assert [int(getattr(stored.state, n)) for n in ("utterances", "tokens", "skipped_writes")] == [14, 280, 2]
    assert stored.state.fingerprint == fingerprint
    assert stored.version == version


def test_another_id_has_no_state(make_store: MakeStore):
    store = make_store()
    store.put("call", state_of(1))
    assert store.get("Call") is None
    assert store.get("call ") is None
    assert not store.drop("cal")


def test_a_session_continues_from_put_to_put(make_store: MakeStore):
    store, version = make_store(), None
    for i in range(1, 6):
        version = store.put("call", state_of(i), version)
    assert store.get("call").state.equals(state_of(5))


@pytest.mark.parametrize("version", ["stale", "made up", None])
def test_a_put_with_another_version_conflicts_and_the_saved_state_stays(make_store: MakeStore, version: str | None):
    store = make_store()
    stale = store.put("call", state_of(1))
    theirs = store.put("call", state_of(2), stale)
    with pytest.raises(SessionConflictError, match="'call'"):
        store.put("call", state_of(3), stale if version == "stale" else version)
    assert store.get("call").state.equals(state_of(2))
    assert store.put("call", state_of(4), theirs)


def test_writing_to_a_dropped_session_starts_a_new_one_without_conflict(make_store: MakeStore):
    store = make_store()
    version = store.put("call", state_of(1))
    assert store.drop("call")
    assert not store.drop("call")
    assert store.get("call") is None
    assert list(store) == []
    store.put("call", state_of(2), version)
    assert store.get("call").state.equals(state_of(2))


def test_writing_to_an_expired_session_starts_a_new_one_without_conflict(make_store: MakeStore):
    store = make_store(ttl_s=60)
    version = store.put("call", state_of(1))
    store.put("other", state_of(1))
    let_time_pass(store, 59)
    assert sorted(store) == ["call", "other"]
    let_time_pass(store, 1)
    assert store.get("call") is None
    assert list(store) == []
    assert not store.drop("other")
    store.put("call", state_of(2), version)


def test_a_put_keeps_a_session_from_expiring(make_store: MakeStore):
    store, version = make_store(ttl_s=60), None
    for i in range(1, 6):
        version = store.put("call", state_of(i), version)
        let_time_pass(store, 40)
    assert store.get("call").state.equals(state_of(5))


def test_a_session_does_not_expire_early(make_store: MakeStore):
    store = make_store(ttl_s=3600)
    store.put("call", state_of(1))
    assert store.get("call") is not None
    assert list(store) == ["call"]


ODD_IDS = [
    "..",
    ".",
    ".hidden",
    "a/b",
    "/etc/passwd",
    "../up",
    "a b",
    " ",
    "a\nb",
    "100%",
    "%41",
    "A",
    "a",
    "ä",
    "a\u0308",
]
ODD_IDS += [
    "\\",
    "*",
    "?",
    "[a]",
    "\x00",
    "con",
    "a.",
    "call.safetensors",
    ".mal_adapter.lock",
    "𝕊🎧",
    "\r",
    "~",
    "Ab",
    "aB",
]


def test_odd_ids_are_kept_apart_and_listed(make_store: MakeStore):
    store = make_store()
    for i, session_id in enumerate(ODD_IDS):
        store.put(session_id, state_of(i))
    assert sorted(store) == sorted(ODD_IDS)
    for i, session_id in enumerate(ODD_IDS):
        assert store.get(session_id).state.equals(state_of(i))
        assert store.drop(session_id)
    assert list(store) == []


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ids=st.sets(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), max_size=6))
def test_any_ids_are_kept_apart_and_listed(make_store: MakeStore, ids: set[str]):
    store = make_store()
    for i, session_id in enumerate(sorted(ids)):
        store.put(session_id, state_of(i))
    assert sorted(store) == sorted(ids)
    for i, session_id in enumerate(sorted(ids)):
        assert store.get(session_id).state.equals(state_of(i))


@pytest.mark.parametrize("session_id", ["", None, 7, "\ud800"], ids=repr)
def test_what_is_no_id_is_refused(make_store: MakeStore, session_id: object):
    store = make_store()
    with pytest.raises(SessionError, match="session id"):
        store.get(session_id)
    with pytest.raises(SessionError, match="session id"):
        store.put(session_id, state_of(1))
    with pytest.raises(SessionError, match="session id"):
        store.drop(session_id)
    assert list(store) == []


@pytest.mark.parametrize("ttl_s", [0, -1, float("nan"), float("inf"), True, "60"], ids=repr)
def test_a_ttl_that_is_no_time_is_refused(make_store: MakeStore, ttl_s: object):
    with pytest.raises(ConfigError, match="ttl_s="):
        make_store(ttl_s=ttl_s)


def test_threads_lose_no_update(make_store: MakeStore):
    threads, times = 8, 50
    store = make_store()
    with ThreadPoolExecutor(threads) as pool:
        conflicts = sum(pool.map(lambda _: count_up(store, "call", times), range(threads)))
    print(f"{threads} threads x {times} utterances, {conflicts} conflicts")
    assert store.get("call").state.equals(state_of(threads * times))
