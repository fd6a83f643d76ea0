"""No tenant sees, lists, overwrites or deletes another's sessions, whatever ids either of them uses."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mal_adapter.errors import SessionError
from mal_adapter.server import ApiKeys, Limits, make_app
from mal_adapter.server.spaces import Space
from mal_adapter.server.tenant_store import TenantStore
from mal_adapter.stores import FolderStore, InMemoryStore
from tests.server.running import in_thread, send

TENANTS = ["a", "a.b", "b"]
KEYS = {tenant: f"the-long-key-of-tenant-{tenant}" for tenant in TENANTS}

ODD = [
    "x",
    "/",
    "//",
    "..",
    "../a/x",
    "../b/x",
    "a/x",
    "b/x",
    "/b/x",
    "a",
    "b",
    "a.b",
    "a%2Fx",
    "x/fork",
    "x/utterances",
]
ODD += ["\n", "x\r\ny", "\x7f", "\u202e", "é", "e\u0301", "🙂", "X", "?", "#", "*", "[x]", "sessions", " ", "x" * 60]
ids = st.one_of(
    st.sampled_from(ODD),
    st.text(st.characters(codec="utf-8", exclude_characters="\0\ufffd"), min_size=1, max_size=12),
)


@given(st.sampled_from(TENANTS), st.sampled_from(TENANTS), ids, ids)
def test_ids_in_the_store_are_of_one_tenant_each(one: str, other: str, first: str, second: str):
    stored = Space(one).stored(first)
    assert Space(one).own(stored) == first
    assert (Space(other).own(stored) is None) == (one != other)
    assert (stored == Space(other).stored(second)) == ((one, first) == (other, second))


@pytest.mark.parametrize("session_id", ["", "a\0b", "\ufffd", chr(0xD800)])
def test_an_id_that_is_no_text_is_refused(session_id: str):
    for tenant in (None, "a"):
        with pytest.raises(SessionError):
            Space(tenant).stored(session_id)


def test_one_tenant_can_not_evict_another():
    store = TenantStore(["a", "b"], lambda: InMemoryStore(max_sessions=2))
    from tests.stores.states import state_of

    store.put("b/kept", state_of(1))
    for number in range(20):
        store.put(f"a/{number}", state_of(1))
    assert sorted(store) == ["a/18", "a/19", "b/kept"]
    assert len(store) == 3
    assert store.drop("b/kept")
    for stranger in ("c/x", "x", "/x", ""):
        with pytest.raises(SessionError):
            store.get(stranger)


Call = Callable[..., Any]
ACTIONS = ["upload", "look", "fork", "drop", "list", "download"]
pools = st.lists(ids, min_size=1, max_size=4, unique=True)
steps = st.lists(
    st.tuples(st.sampled_from(TENANTS), st.sampled_from(ACTIONS), st.integers(0, 3), st.integers(0, 3)), max_size=30
)


@pytest.fixture(scope="module", params=["memory", "folder"])
def call(request, loaded, tmp_path_factory):
    """Sends a request of a tenant."""
    from mal_adapter import attach_memory
    from mal_adapter.demo import ADAPTER_FOLDER, EMOTIONS, PROMPT
    from mal_adapter.ser.recognizer import EmotionRecognizer

    store = TenantStore(TENANTS) if request.param == "memory" else FolderStore(tmp_path_factory.mktemp("sessions"))
    keys = ApiKeys([(tenant, hashlib.sha256(key.encode()).digest()) for tenant, key in KEYS.items()])
    with attach_memory(loaded[0], adapter=ADAPTER_FOLDER, store=store) as memory:
        app = make_app(EmotionRecognizer(*loaded, memory, EMOTIONS, PROMPT), memory, Limits(), keys)
        with in_thread(app) as port:

            def call(tenant: str, method: str, path: str, body: bytes | None = None) -> Any:
                return send(port, method, path, body, {"Authorization": f"Bearer {KEYS[tenant]}"})

            call.memory = memory
            yield call


def coded(session_id: str) -> str:
    return quote(session_id, safe="")


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pools, steps)
def test_tenants_have_separate_sessions(call: Any, pool: list[str], steps: list[tuple[str, str, int, int]]):
    """Against a dictionary per tenant: each state is marked by its tenant, and none is found with another's mark."""
    states = call.memory.states
    states.clear()
    fresh = call.memory.adapter.initial_state()
    model: dict[str, dict[str, int]] = {tenant: {} for tenant in TENANTS}

    def long_for_a_file(tenant: str, session_id: str) -> bool:
        try:
            states.store.get(Space(tenant).stored(session_id))
        except SessionError:
            return True
        return False

    for number, (tenant, action, first, second) in enumerate(steps):
        own, session_id, other = model[tenant], pool[first % len(pool)], pool[second % len(pool)]
        if long_for_a_file(tenant, session_id) or long_for_a_file(tenant, other):
            continue
        path = f"/sessions/{coded(session_id)}"
        if action == "upload":
            mark = 1000 * (1 + TENANTS.index(tenant)) + number
            body = fresh.map(torch.clone)
            body.utterances.fill_(mark)
            reply = call(tenant, "PUT", f"/states/{coded(session_id)}", body.to_bytes())
            assert reply.status == (409 if session_id in own else 201), reply
            own.setdefault(session_id, mark)
        if action == "look":
            reply = call(tenant, "GET", path)
            assert reply.status == (200 if session_id in own else 404)
            assert reply.status == 404 or reply.json["utterances"] == own[session_id]
        if action == "download":
            reply = call(tenant, "GET", f"/states/{coded(session_id)}")
            assert reply.status == (200 if session_id in own else 404)
            if reply.status == 200:
                assert int(type(fresh).from_bytes(reply.body).utterances) == own[session_id]
        if action == "fork":
            reply = call(tenant, "POST", f"{path}/fork", json.dumps({"to": other}).encode())
            assert reply.status == (404 if session_id not in own else 409 if other in own else 201), reply
            if reply.status == 201:
                own[other] = own[session_id]
        if action == "drop":
            assert call(tenant, "DELETE", path).status == (204 if session_id in own else 404)
            own.pop(session_id, None)
        if action == "list":
            found, after = [], ""
            while after is not None:
                page = call(tenant, "GET", "/sessions?" + urlencode({"limit": 2, "after": after})).json
                found += page["sessions"]
                after = page["next"]
            assert found == sorted(own)
    for tenant, own in model.items():
        assert call(tenant, "GET", "/sessions?limit=1000").json == {"sessions": sorted(own), "next": None}
        for session_id, mark in own.items():
            assert mark // 1000 == 1 + TENANTS.index(tenant)
            assert call(tenant, "GET", f"/sessions/{coded(session_id)}").json["utterances"] == mark


@pytest.mark.slow
def test_pages(call: Any):
    call.memory.states.clear()
    fresh = call.memory.adapter.initial_state().to_bytes()
    for number in range(7):
        assert call("a", "PUT", f"/states/s{number}", fresh).status == 201
    first = call("a", "GET", "/sessions?limit=3").json
    assert first == {"sessions": ["s0", "s1", "s2"], "next": "s2"}
    assert call("a", "GET", "/sessions?limit=4&after=s2").json == {"sessions": ["s3", "s4", "s5", "s6"], "next": None}
    for wrong in ("limit=0", "limit=1001", "limit=x", "limit=" + "9" * 5000):
        reply = call("a", "GET", f"/sessions?{wrong}")
        assert (reply.status, reply.json["type"]) == (422, "invalid_request")
    assert call("b", "GET", "/sessions").json["sessions"] == []


def test_the_file_of_keys_has_no_place_for_a_slash(tmp_path: Path):
    """Or `a` could name itself `a/x`, and the sessions `a/x/…` would be of both."""
    from mal_adapter.errors import ConfigError

    (tmp_path / "keys").write_text("a/x 0123456789abcdefghijklmnop\n")
    with pytest.raises(ConfigError):
        ApiKeys.read(tmp_path / "keys")
