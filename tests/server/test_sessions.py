"""The embedded server: all kinds of session ids, and outages of its store."""

import contextlib
import http.client
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest
import uvicorn
from fastapi.testclient import TestClient

from mal_adapter import AttachedMemory, MemoryState, attach_memory
from mal_adapter.demo import ADAPTER_FOLDER, EMOTIONS, HOST_FOLDER, PROMPT
from mal_adapter.demo.dialogues import make_dialogue, write_wavs
from mal_adapter.errors import StoreError
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
from mal_adapter.server import Limits, make_app
from mal_adapter.stores import FolderStore, InMemoryStore, SessionStore, unsaved
from tests.stores.servers import free_port, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::mal_adapter.errors.UnsavedSessionWarning")]

LIMITS = Limits(max_bytes=2**20, timeout_s=60.0)


class Faulty(InMemoryStore):
    away = False

    def put(self, session_id: str, state: MemoryState, version: str | None = None) -> str:
        if self.away:
            raise StoreError("can't write sessions in redis://secret-host:6379/0: this is a replica")
        return super().put(session_id, state, version)


@pytest.fixture(scope="module")
def host() -> tuple[Any, Any]:
    return load_host(str(HOST_FOLDER))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    (dialogue,) = write_wavs([make_dialogue("test", seed=11, index=0)], tmp_path_factory.mktemp("wav"))
    return dialogue.utterances[0].audio.read_bytes()


@contextlib.contextmanager
def application(host: tuple[Any, Any], store: SessionStore) -> Iterator[tuple[Any, AttachedMemory]]:
    with attach_memory(host[0], adapter=ADAPTER_FOLDER, store=store) as memory:
        recognizer = EmotionRecognizer(*host, memory, EMOTIONS, PROMPT)
        yield make_app(recognizer, memory, LIMITS), memory


# --------------------------------------------------------------------------------------------------------------- ids

Send = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="module", params=["folder", "memory"])
def send(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Send]:
    """Sends a path unchanged, which clients may normalize, to a server that decodes it."""
    store = FolderStore(tmp_path_factory.mktemp("sessions")) if request.param == "folder" else InMemoryStore()
    with application(load_host(str(HOST_FOLDER)), store) as (app, _):
        server = uvicorn.Server(uvicorn.Config(app, port=(port := free_port()), log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        wait_until(lambda: server.started)

        def sent(method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request(method, path, body)
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            return answer.status, json.loads(data) if data else None

        yield sent
        server.should_exit = True
        thread.join()


IDS = [
    "call-1",
    "tenant/call-1",
    "train/0",
    "a/b/c/d",
    "/",
    "//",
    "/leading",
    "trailing/",
    "utterances",
    "a/utterances",
]
IDS += ["a/utterances/utterances", "/utterances", "a?b=c", "a#b", "a%2Fb", "100%", "a b", "+", "a;b", "a&b", "{a}", "*"]
IDS += [
    "..",
    ".",
    "../etc/passwd",
    "a/../b",
    "a\nb",
    "a\tb",
    "\\",
    "'\"",
    "énervé",
    "通話/1",
    "🙂",
    "x" * 200,
    "?",
]


@pytest.mark.parametrize("session_id", IDS)
def test_a_session_of_this_id_is_written_read_and_deleted(session_id: str, send: Send, sound: bytes):
    path = f"/sessions/{quote(session_id, safe='')}"
    status, answer = send("POST", f"{path}/utterances", sound)
    assert status == 200, answer
    assert (answer["session"], answer["utterance"]) == (session_id, 1)
    status, answer = send("GET", path)
    assert (status, answer["session"], answer["utterances"]) == (200, session_id, 1)
    assert send("DELETE", path)[0] == 204
    assert send("GET", path)[0] == 404
    assert send("DELETE", path)[0] == 404


def test_ids_that_look_alike_are_different_sessions(send: Send, sound: bytes):
    alike = ["a/b", "a%2Fb", "a//b", "a/b/", "/a/b", "A/b", "a\\b"]
    for number, session_id in enumerate(alike):
        for turn in range(number + 1):
            answer = send("POST", f"/sessions/{quote(session_id, safe='')}/utterances", sound)[1]
            assert answer["utterance"] == turn + 1, session_id
    assert send("GET", "/sessions/a/b")[1]["utterances"] == 1  # a slash that was not encoded is the same
    for session_id in alike:
        assert send("DELETE", f"/sessions/{quote(session_id, safe='')}")[0] == 204


@pytest.mark.parametrize("coded", ["", "a%00b", "%FF", "a%FEb", "%ED%A0%80", "%C3"], ids=lambda coded: coded or "empty")
def test_an_invalid_id_is_answered_400_with_advice_by_every_route(coded: str, send: Send, sound: bytes):
    for method, path, body in (
        ("POST", f"/sessions/{coded}/utterances", sound),
        ("GET", f"/sessions/{coded}", None),
        ("DELETE", f"/sessions/{coded}", None),
    ):
        status, answer = send(method, path, body)
        assert (status, answer["detail"].split(";")[0]) == (400, "this is not a valid session id")


def test_an_id_too_long_for_the_store_is_answered_400(send: Send, sound: bytes, request: pytest.FixtureRequest):
    status, answer = send("POST", f"/sessions/{'x' * 3000}/utterances", sound)
    assert status == (400 if "folder" in request.node.name else 200), answer


def test_other_paths_are_404_and_other_methods_405(send: Send, sound: bytes):
    assert send("GET", "/session/call-1")[0] == 404
    assert send("POST", "/sessions", sound)[0] == 405
    assert send("POST", "/sessions/call-1", sound)[0] == 405
    assert send("PUT", "/sessions/call-1/utterances", sound)[0] == 405


# ----------------------------------------------------------------------------------------------------------- outages


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """No attempt is due by time; only a saved session wakes the thread."""
    monkeypatch.setattr(unsaved, "FIRST_S", 3600.0)
    monkeypatch.setattr(unsaved, "LONGEST_S", 3600.0)


def post(client: TestClient, session: str, sound: bytes) -> Any:
    return client.post(f"/sessions/{session}/utterances", content=sound)


@pytest.mark.usefixtures("by_hand")
def test_calls_that_ended_in_an_outage_are_saved_after_it_and_health_shows_both(host: tuple[Any, Any], sound: bytes):
    store = Faulty()
    with application(host, store) as (app, _), TestClient(app) as client:
        calm = {"status": "alive", "pending": 0, "unsaved": 0, "outage": None, "lost": 0}
        assert client.get("/health").json() == calm
        store.away = True
        assert [post(client, f"ended/{n}", sound).json()["saved"] for n in range(5)] == [False] * 5
        health = client.get("/health")
        assert (health.status_code, health.json()["unsaved"]) == (200, 5)
        assert health.json()["outage"].keys() == {"since_s", "next_try_s"}
        assert "secret-host" not in health.text
        assert client.get("/ready").status_code == 200, "what waits can be answered"
        assert client.get("/sessions/ended%2F0").json()["saved"] is False
        store.away = False
        assert post(client, "other", sound).json()["saved"]
        wait_until(lambda: client.get("/health").json() == calm)
        assert sorted(store) == [*(f"ended/{n}" for n in range(5)), "other"]


@pytest.mark.usefixtures("by_hand")
def test_a_long_outage_is_bounded_in_memory(host: tuple[Any, Any], sound: bytes):
    store = Faulty()
    with application(host, store) as (app, memory), TestClient(app) as client:
        memory.states.backlog.max_sessions = 2
        store.away = True
        assert [post(client, session, sound).status_code for session in ("a", "b", "c", "a")] == [200, 200, 503, 200]
        assert client.get("/sessions/c").status_code == 404, "as it was"
        assert (client.get("/ready").status_code, client.get("/health").status_code) == (503, 200)
        store.away = False
        assert post(client, "c", sound).json()["utterance"] == 1
        wait_until(lambda: client.get("/health").json()["unsaved"] == 0)
        assert client.get("/ready").status_code == 200
        assert client.get("/sessions/a").json()["utterances"] == 2


@pytest.mark.usefixtures("by_hand")
def test_an_utterance_of_a_session_that_another_replica_continued_is_a_conflict(host: tuple[Any, Any], sound: bytes):
    store = Faulty()
    with application(host, store) as (app, memory), TestClient(app) as client:
        store.away = True
        post(client, "shared", sound)
        post(client, "shared", sound)
        store.away = False
        store.put("shared", memory.adapter.initial_state())
        conflict = post(client, "shared", sound)
        assert (conflict.status_code, "another replica" in conflict.json()["detail"]) == (409, True)
        assert post(client, "shared", sound).json()["utterance"] == 1


@pytest.mark.usefixtures("by_hand")
def test_a_shutdown_saves_all_that_it_can(host: tuple[Any, Any], sound: bytes, caplog: pytest.LogCaptureFixture):
    store = Faulty()
    with application(host, store) as (app, memory):
        with TestClient(app) as client:
            store.away = True
            for session in ("a", "b", "c"):
                post(client, session, sound)
            store.away = False
            theirs = store.put("a", memory.adapter.initial_state())
        assert memory.states.unsaved == []
    assert store.get("a").version == theirs
    assert sorted(store) == ["a", "b", "c"]
    assert [record for record in caplog.records if record.levelno == logging.ERROR and "'a'" in record.getMessage()]


def test_a_store_that_hangs_delays_no_request(host: tuple[Any, Any], sound: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unsaved, "FIRST_S", 0.01)
    release, hanging = threading.Event(), threading.Event()

    class Hanging(Faulty):
        def put(self, session_id: str, state: MemoryState, version: str | None = None) -> str:
            if threading.current_thread().name == "mal_adapter":
                hanging.set()
                assert release.wait(60)
            return super().put(session_id, state, version)

    store = Hanging()
    with application(host, store) as (app, _), TestClient(app) as client:
        store.away = True
        post(client, "ended", sound)
        assert hanging.wait(20)
        store.away = False
        started = time.monotonic()
        assert [post(client, f"other-{n}", sound).json()["saved"] for n in range(3)] == [True] * 3
        assert client.get("/health").json()["unsaved"] == 1
        assert time.monotonic() - started < 30, "three forwards, and not the minute that the store hangs"
        release.set()
        wait_until(lambda: client.get("/health").json()["unsaved"] == 0)
