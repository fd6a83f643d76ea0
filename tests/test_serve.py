"""examples/serve.py as its users meet it: processes behind sockets, two replicas over one folder of sessions."""

import asyncio
import collections
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile

from mal_adapter import attach_memory
from mal_adapter.demo import ADAPTER_FOLDER, EMOTIONS, HOST_FOLDER, PROMPT
from mal_adapter.demo.dialogues import make_dialogues, write_wavs
from mal_adapter.ser.dialogue import Dialogue
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
from tests.stores.servers import free_port

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "examples" / "serve.py"
TURNS = 4


class Server:
    """A process of serve.py that answers when `wait` returns."""

    def __init__(self, folder: Path, *options: object) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self.log = folder / f"log-{port}"
        self.temporary = folder / f"tmp-{port}"
        self.temporary.mkdir()
        command = [sys.executable, SCRIPT, "--port", port, "--store", folder / "sessions", *options]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*map(str, command)], stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(self.temporary)}
            )

    def wait(self) -> "Server":
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return self
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=60, limits=httpx.Limits(max_connections=100))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[list[Server]]:
    """The second one is impatient."""
    servers = [Server(folder), Server(folder, "--timeout-s", 0.2)]
    try:
        yield [server.wait() for server in servers]
    finally:
        for server in servers:
            server.process.kill()
            server.process.wait()


@pytest.fixture(scope="module")
def server(servers: list[Server]) -> Server:
    return servers[0]


@pytest.fixture(scope="module")
def hasty(servers: list[Server]) -> Server:
    return servers[1]


@pytest.fixture(scope="module")
def dialogues(folder: Path) -> list[Dialogue]:
    return write_wavs(list(make_dialogues("test", seed=11, count=5, turns=TURNS)), folder / "wav")


@pytest.fixture(scope="module")
def bodies(dialogues: list[Dialogue]) -> list[list[bytes]]:
    return [[utterance.audio.read_bytes() for utterance in dialogue.utterances] for dialogue in dialogues]


@pytest.fixture(scope="module")
def expected(dialogues: list[Dialogue]) -> list[list[dict[str, float]]]:
    """Probabilities of each utterance of each dialogue, from one process that hears them in order."""
    model, processor = load_host(str(HOST_FOLDER))
    with attach_memory(model, adapter=ADAPTER_FOLDER) as memory:
        recognizer = EmotionRecognizer(model, processor, memory, EMOTIONS, PROMPT)
        return [[result.probabilities for result in recognizer.recognize(dialogue)] for dialogue in dialogues]


def sound(duration_s: float, amplitude: float = 0.1, file_format: str = "WAV", sampling_rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    samples = amplitude * np.sin(np.arange(int(duration_s * sampling_rate)) / 20)
    soundfile.write(file, samples, sampling_rate, format=file_format)
    return file.getvalue()


def post(server: Server, session: str, content: object, **more: object) -> httpx.Response:
    return httpx.post(f"{server.url}/sessions/{session}/utterances", content=content, timeout=60, **more)


def heard(server: Server, session: str) -> int:
    """How many utterances the session's memory holds."""
    answer = httpx.get(f"{server.url}/sessions/{session}")
    return answer.json()["utterances"] if answer.status_code == 200 else 0


def test_fifty_requests_at_once_are_answered_in_order_by_sessions_of_their_own(server, bodies, expected):
    """Two utterances of each of 25 calls, the second sent before the first is answered. Five calls say the same."""
    calls = [(f"crowd-{index}", index % 5) for index in range(25)]

    async def crowd() -> list[list[httpx.Response]]:
        async with server.client() as client:

            async def say(turn: int) -> list[httpx.Response]:
                posts = (client.post(f"/sessions/{i}/utterances", content=bodies[n][turn]) for i, n in calls)
                return await asyncio.gather(*posts)

            first = asyncio.create_task(say(0))
            arrived = 0
            while arrived < 25 and not first.done():  # so that no first utterance is overtaken on its way
                arrived = (await client.get("/health")).json()["pending"] + server.log.read_text().count("crowd-")
                await asyncio.sleep(0.02)
            return [*await asyncio.gather(first, say(1))]

    answers = asyncio.run(crowd())
    for turn, responses in enumerate(answers):
        for (session, number), response in zip(calls, responses, strict=True):
            assert response.status_code == 200, response.text
            answer = response.json()
            assert (answer["session"], answer["utterance"], answer["saved"]) == (session, turn + 1, True)
            assert answer["probabilities"] == pytest.approx(expected[number][turn], abs=1e-5)
            assert answer["emotion"] == max(EMOTIONS, key=answer["probabilities"].__getitem__)
    state = httpx.get(f"{server.url}/sessions/crowd-0").json()
    assert state == {"session": "crowd-0", "utterances": 2, "tokens": 36, "skipped_writes": 0, "saved": True}


@pytest.mark.parametrize("file_format", ["FLAC", "OGG", "MP3"])
def test_formats(server, file_format):
    answer = post(server, f"format-{file_format}", sound(1.0, file_format=file_format))
    assert answer.status_code == 200, answer.text
    assert answer.json()["audio_s"] == pytest.approx(1.0, abs=0.1)


def test_a_session_that_is_deleted_begins_anew(server, bodies, expected):
    assert post(server, "again", bodies[0][0]).json()["utterance"] == 1
    assert post(server, "again", bodies[0][1]).json()["utterance"] == 2
    assert httpx.delete(f"{server.url}/sessions/again").status_code == 204
    assert httpx.get(f"{server.url}/sessions/again").status_code == 404
    answer = post(server, "again", bodies[0][0]).json()
    assert answer["utterance"] == 1
    assert answer["probabilities"] == pytest.approx(expected[0][0], abs=1e-5)


BAD = {
    "text": (b"turn1.wav", {}, 415, "unknown_format"),
    "form": (b"--x--", {"content-type": "multipart/form-data; boundary=x"}, 415, "unknown_format"),
    "empty": (b"", {}, 422, "bad_audio"),
    "cut": (sound(1.0)[:20_000], {}, 422, "bad_audio"),
    "silent": (sound(1.0, amplitude=0.0), {}, 422, "bad_audio"),
    "long": (sound(31.0, sampling_rate=8000), {}, 422, "audio_too_long"),
    "longer-than-the-host-hears": (sound(20.0), {}, 422, "audio_too_long"),
    "hours-in-a-few-bytes": (sound(4 * 3600, 0.0, "FLAC", 1000), {}, 422, "audio_too_long"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_audio_is_refused_and_leaves_no_session(server, what):
    content, headers, status, error = BAD[what]
    answer = post(server, f"bad-{what}", content, headers=headers)
    assert (answer.status_code, answer.json()["error"]) == (status, error)
    assert str(server.temporary) not in answer.text
    assert httpx.get(f"{server.url}/sessions/bad-{what}").status_code == 404


def test_bodies_that_are_too_large_are_refused_while_they_arrive(server):
    def endless() -> Iterator[bytes]:
        for _ in range(10_000):
            nonlocal sent
            sent += 100_000
            yield bytes(100_000)

    sent = 0
    declared = post(server, "large", bytes(10 * 2**20 + 1))
    undeclared = post(server, "large", endless())
    for answer in (declared, undeclared):
        assert (answer.status_code, answer.json()["error"]) == (413, "too_large")
    assert sent < 100_000_000
    assert heard(server, "large") == 0


def test_wrong_ids_sessions_and_routes_are_json_too(server):
    with httpx.Client(base_url=server.url) as client:
        answers = {
            "bad_session_id": [
                client.post("/sessions/a%20b/utterances"),
                client.get(f"/sessions/{'x' * 65}"),
                client.get("/sessions/%2e%2e%2fetc"),
                client.delete("/sessions/caf%C3%A9"),
            ],
            "unknown_session": [client.get("/sessions/nobody"), client.delete("/sessions/nobody")],
            "no_route": [client.get("/nothing"), client.put("/health")],
        }
    assert {error: [answer.json()["error"] for answer in group] for error, group in answers.items()} == {
        error: [error] * len(group) for error, group in answers.items()
    }
    assert [a.status_code for group in answers.values() for a in group] == [400, 400, 400, 400, 404, 404, 404, 405]


def storm(server: Server, sessions: list[str], requests: int, body: bytes) -> list[httpx.Response]:
    """So many requests at once, for each session in turn."""

    async def send() -> list[httpx.Response]:
        async with server.client() as client:
            posts = (client.post(f"/sessions/{sessions[i % 5]}/utterances", content=body) for i in range(requests))
            return await asyncio.gather(*posts)

    return asyncio.run(send())


def check_heard_if_answered(server: Server, sessions: list[str], answers: list[httpx.Response]) -> None:
    errors = {408: "slow_upload", 503: "overloaded", 504: "timeout"}
    for answer in answers:
        assert answer.json().get("error") == errors.get(answer.status_code)
        assert ("retry-after" in answer.headers) == (answer.status_code in (503, 504))
    for number, session in enumerate(sessions):
        assert heard(server, session) == sum(answer.status_code == 200 for answer in answers[number::5])


def test_more_requests_than_there_are_places_are_sent_away(server, bodies):
    sessions = [f"many-{number}" for number in range(5)]
    answers = storm(server, sessions, 100, bodies[0][0])
    assert {answer.status_code for answer in answers} == {200, 503}
    check_heard_if_answered(server, sessions, answers)


def test_who_is_told_too_late_has_not_been_heard(hasty, bodies):
    """Whatever the speed of the machine: an utterance is in its session exactly if it was answered with 200."""
    sessions = [f"late-{number}" for number in range(5)]
    answers: list[httpx.Response] = []
    counts: collections.Counter[int] = collections.Counter()
    while not (counts[200] and counts[504]) and len(answers) < 400:
        answers += storm(hasty, sessions, 40, bodies[0][0])
        counts = collections.Counter(answer.status_code for answer in answers)
    assert counts[504]
    check_heard_if_answered(hasty, sessions, answers)


def test_an_upload_that_stalls_gives_its_place_back(hasty):
    address = httpx.URL(hasty.url)
    with socket.create_connection((address.host, address.port)) as sender:
        sender.sendall(b"POST /sessions/stalled/utterances HTTP/1.1\r\nHost: x\r\nContent-Length: 50000\r\n\r\nRIFF")
        assert b" 408 " in sender.recv(1000)
    deadline = time.monotonic() + 10
    while httpx.get(f"{hasty.url}/health").json()["pending"]:
        assert time.monotonic() < deadline


def test_replicas_never_lose_an_utterance_that_they_answered(server, hasty, bodies):
    """Both continue one session at once: the slower one is told of the conflict, and nothing it heard is kept."""

    async def race() -> collections.Counter[int]:
        counts: collections.Counter[int] = collections.Counter()
        async with server.client() as one, hasty.client() as other:
            while not counts[409] and sum(counts.values()) < 400:
                posts = (client.post("/sessions/shared/utterances", content=bodies[0][0]) for client in (one, other))
                counts += collections.Counter(answer.status_code for answer in await asyncio.gather(*posts))
        return counts

    counts = asyncio.run(race())
    assert counts[409]
    assert heard(server, "shared") == heard(hasty, "shared") == counts[200]


def test_a_store_that_is_away_is_told_and_found_again(server, folder, bodies, expected):
    assert post(server, "outage", bodies[1][0]).status_code == 200
    (folder / "sessions").rename(folder / "away")
    try:
        answers = [post(server, "outage", bodies[1][1]), httpx.get(f"{server.url}/sessions/outage")]
        answers.append(httpx.get(f"{server.url}/ready"))
        assert httpx.get(f"{server.url}/health").status_code == 200
    finally:
        (folder / "away").rename(folder / "sessions")
    assert [(answer.status_code, answer.json()["error"]) for answer in answers] == [(503, "store_unreachable")] * 3
    assert str(folder) not in "".join(answer.text for answer in answers)
    answer = post(server, "outage", bodies[1][1]).json()
    assert answer["utterance"] == 2
    assert answer["probabilities"] == pytest.approx(expected[1][1], abs=1e-5)


def test_a_session_goes_on_after_sigterm_and_what_was_under_way_is_answered(servers, folder, bodies, expected):
    old = servers[0]

    async def stop() -> list[httpx.Response]:
        async with old.client() as client:
            posts = [client.post(f"/sessions/last-{i}/utterances", content=bodies[i % 5][0]) for i in range(16)]
            tasks = [asyncio.create_task(post) for post in posts]
            while (await client.get("/health")).json()["pending"] + sum(task.done() for task in tasks) < 16:
                await asyncio.sleep(0.005)
            old.process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*tasks)

    answers = asyncio.run(stop())
    assert old.process.wait(timeout=60) in (0, -signal.SIGTERM)
    assert "Finished server process" in old.log.read_text()
    assert "Traceback" not in old.log.read_text()
    assert list(old.temporary.glob("utterances-*")) == []
    assert [answer.status_code for answer in answers] == [200] * 16

    servers[0] = new = Server(folder).wait()
    for turn in range(1, TURNS):
        answer = post(new, "last-0", bodies[0][turn]).json()
        assert answer["utterance"] == turn + 1
        assert answer["probabilities"] == pytest.approx(expected[0][turn], abs=1e-5)
