"""`mal-adapter serve` as its users meet it: HTTP over sockets, and two replicas over one real Redis."""

import asyncio
import contextlib
import io
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import redis
import soundfile
import uvicorn

from mal_adapter import attach_memory
from mal_adapter.demo import ADAPTER_FOLDER, EMOTIONS, HOST_FOLDER, PROMPT
from mal_adapter.demo.dialogues import make_dialogues, write_wavs
from mal_adapter.ser.dialogue import Dialogue
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
from mal_adapter.server import Limits, make_app
from tests.stores.servers import PASSWORD, RedisServer, free_port

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def database() -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory(prefix="mal") as folder:
        replica = ("--user", "replica", "on", f">{PASSWORD}", "~*", "&*", "+@all")
        server = RedisServer(Path(folder), "--appendonly", "yes", "--appendfsync", "always", *replica).start()
        yield server
        server.kill()


@contextlib.contextmanager
def read_only(database: RedisServer) -> Iterator[None]:
    """A Redis that lets the replica read, but not write."""
    with redis.Redis.from_url(database.url) as client:
        client.execute_command("ACL", "SETUSER", "replica", "-set")
        try:
            yield
        finally:
            client.execute_command("ACL", "SETUSER", "replica", "+set")


class Replica:
    """The command as a process of its own."""

    def __init__(self, store: str, log: Path) -> None:
        self.log, self.url = log, f"http://127.0.0.1:{(port := free_port())}"
        command = [sys.executable, "-m", "mal_adapter.cli", "serve", "--port", str(port), "--ttl-s", "3600"]
        command += ["--store", store]
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file)

    def wait(self) -> str:
        """Its address, as soon as it answers there."""
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return self.url
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)


@pytest.fixture(scope="module")
def replica(database: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    replica = Replica(database.url.replace("//:", "//replica:"), tmp_path_factory.mktemp("replica") / "log")
    yield replica
    replica.process.kill()
    replica.process.wait()


@pytest.fixture(scope="module")
def limits() -> Limits:
    return Limits(max_bytes=2**20, timeout_s=60.0)


@pytest.fixture(scope="module")
def url(database: RedisServer, replica: Replica, limits: Limits) -> Iterator[str]:
    """The address of a server in this process, which has imported torch already; the replica starts meanwhile."""
    model, processor = load_host(str(HOST_FOLDER))
    with attach_memory(model, adapter=ADAPTER_FOLDER, store=database.url) as memory:
        recognizer = EmotionRecognizer(model, processor, memory, EMOTIONS, PROMPT)
        app = make_app(recognizer, memory, limits)
        server = uvicorn.Server(uvicorn.Config(app, port=(port := free_port()), log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> list[Dialogue]:
    return write_wavs(list(make_dialogues("test", seed=11, count=5, turns=3)), tmp_path_factory.mktemp("wav"))


@pytest.fixture(scope="module")
def bodies(dialogues: list[Dialogue]) -> list[list[bytes]]:
    return [[utterance.audio.read_bytes() for utterance in dialogue.utterances] for dialogue in dialogues]


@pytest.fixture(scope="module")
def expected(dialogues: list[Dialogue]) -> list[list[dict[str, float]]]:
    """Probabilities of each utterance of each dialogue, one by one and without a server."""
    model, processor = load_host(str(HOST_FOLDER))
    with attach_memory(model, adapter=ADAPTER_FOLDER) as memory:
        recognizer = EmotionRecognizer(model, processor, memory, EMOTIONS, PROMPT)
        return [[result.probabilities for result in recognizer.recognize(dialogue)] for dialogue in dialogues]


def post(url: str, session: str, content: bytes) -> httpx.Response:
    return httpx.post(f"{url}/sessions/{session}/utterances", content=content, timeout=60)


def utterances_of(url: str, session: str) -> int:
    """The number of utterances in the session's memory."""
    answer = httpx.get(f"{url}/sessions/{session}")
    return answer.json()["utterances"] if answer.status_code == 200 else 0


def client_of(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=200))


async def until(client: httpx.AsyncClient, enough: Callable[[int], bool]) -> None:
    """Until so many requests are under way."""
    deadline = time.monotonic() + 60
    while not enough((await client.get("/health")).json()["pending"]):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def begin(
    url: str, session: str, body: bytes, sent: int | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A POST of which `sent` bytes are sent, by a client that may disconnect."""
    address = httpx.URL(url)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    head = f"POST /sessions/{session}/utterances HTTP/1.1\r\nHost: {address.host}\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:sent])
    return reader, writer


def test_fifty_calls_at_once_are_answered_as_one_by_one(url, bodies, expected):
    """Five dialogues, ten times each, two utterances. In between, a client disconnects while it is queued."""
    calls = [(f"crowd-{index}", index % 5) for index in range(50)]

    async def crowd(turn: int) -> list[httpx.Response]:
        async with client_of(url) as client:
            posts = (client.post(f"/sessions/{i}/utterances", content=bodies[n][turn]) for i, n in calls)
            answers = asyncio.gather(*posts)
            await until(client, lambda pending: pending >= 20)
            _, impatient = await begin(url, "gone", bodies[0][0])
            await asyncio.sleep(0.05)
            impatient.close()
            return await answers

    for turn in range(2):
        for (session, number), response in zip(calls, asyncio.run(crowd(turn)), strict=True):
            assert response.status_code == 200, response.text
            answer = response.json()
            assert (answer["session"], answer["utterance"], answer["saved"]) == (session, turn + 1, True)
            assert answer["probabilities"] == pytest.approx(expected[number][turn], abs=1e-5)
            assert answer["emotion"] == max(EMOTIONS, key=answer["probabilities"].__getitem__)
    state = httpx.get(f"{url}/sessions/crowd-0").json()
    assert state == {"session": "crowd-0", "utterances": 2, "tokens": 36, "skipped_writes": 0, "saved": True}
    assert utterances_of(url, "gone") == 0


def stalled(body: bytes, resume: asyncio.Event) -> AsyncIterator[bytes]:
    async def parts() -> AsyncIterator[bytes]:
        yield body[:1000]
        await resume.wait()
        yield body[1000:]

    return parts()


def test_utterances_of_one_call_are_processed_in_the_order_in_which_they_begin(url, bodies, expected):
    """The later ones have arrived while the first is still on its way."""

    async def call() -> list[httpx.Response]:
        async with client_of(url) as client:
            resume, tasks = asyncio.Event(), []
            for turn, body in enumerate(bodies[0]):
                content = stalled(body, resume) if turn == 0 else body
                tasks.append(asyncio.create_task(client.post("/sessions/pipelined/utterances", content=content)))
                await until(client, (turn + 1).__eq__)
            tasks.append(asyncio.create_task(client.delete("/sessions/pipelined")))
            await until(client, (4).__eq__)
            resume.set()
            return await asyncio.gather(*tasks)

    *answers, deleted = asyncio.run(call())
    assert [answer.json()["utterance"] for answer in answers] == [1, 2, 3]
    for answer, probabilities in zip(answers, expected[0], strict=True):
        assert answer.json()["probabilities"] == pytest.approx(probabilities, abs=1e-5)
    assert deleted.status_code == 204
    assert httpx.get(f"{url}/sessions/pipelined").status_code == 404
    assert httpx.delete(f"{url}/sessions/pipelined").status_code == 404
    assert post(url, "pipelined", bodies[0][0]).json()["utterance"] == 1


def sound(duration_s: float, amplitude: float = 0.1, file_format: str = "WAV", sampling_rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    samples = amplitude * np.sin(np.arange(int(duration_s * sampling_rate)) / 20)
    soundfile.write(file, samples, sampling_rate, format=file_format)
    return file.getvalue()


@pytest.mark.parametrize("file_format", ["FLAC", "OGG", "MP3"])
def test_formats(url, file_format):
    answer = post(url, f"format-{file_format}", sound(1.0, file_format=file_format))
    assert answer.status_code == 200, answer.text
    assert answer.json()["audio_s"] == pytest.approx(1.0, abs=0.1)


BAD = {
    "text": (b"turn1.wav", 415, "these 9 bytes are not a sound file; send the file itself"),
    "empty": (b"", 415, "these 0 bytes are not a sound file; send the file itself"),
    "cut": (sound(1.0)[:20_000], 422, "the file is cut short"),
    "silent": (sound(1.0, amplitude=0.0), 422, "the audio is silent"),
    "long": (sound(20.0), 422, "the audio lasts 20.00 s, but this host processes at most"),
    "hours-in-a-few-bytes": (sound(4 * 3600, 0.0, "FLAC", 1000), 422, "14400.00 s of audio; up to 30 s"),
    "large": (bytes(2**20 + 1), 413, "the body has more than 1048576 bytes"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_not_an_utterance_is_refused_and_makes_no_session(url, what):
    content, status, reason = BAD[what]
    answer = post(url, f"bad-{what}", content)
    assert answer.status_code == status
    assert answer.json()["detail"].startswith(reason)
    assert httpx.get(f"{url}/sessions/bad-{what}").status_code == 404


def test_an_endless_body_is_refused_during_the_upload(url):
    def endless() -> Iterator[bytes]:
        for _ in range(10_000):
            nonlocal sent
            sent += 100_000
            yield bytes(100_000)

    sent = 0
    assert post(url, "endless", endless()).status_code == 413
    assert sent < 100_000_000


def test_requests_beyond_max_pending_are_refused(url, limits, bodies, monkeypatch):
    monkeypatch.setattr(limits, "max_pending", 3)

    async def crowd() -> list[httpx.Response]:
        async with client_of(url) as client:
            resume = asyncio.Event()
            contents = [stalled(bodies[0][0], resume) for _ in range(3)]
            tasks = [asyncio.create_task(client.post("/sessions/full/utterances", content=each)) for each in contents]
            await until(client, (3).__eq__)
            more = await client.post("/sessions/more/utterances", content=bodies[0][0])
            resume.set()
            return [more, *await asyncio.gather(*tasks)]

    more, *answers = asyncio.run(crowd())
    assert (more.status_code, more.headers["retry-after"]) == (503, "1")
    assert [answer.json()["utterance"] for answer in answers] == [1, 2, 3]
    assert post(url, "more", bodies[0][0]).json()["utterance"] == 1


def test_a_request_that_waits_too_long_is_refused_and_not_processed(url, limits, bodies, monkeypatch):
    """Behind others, or during its own upload. Whatever the speed of the machine: processed exactly if answered."""
    monkeypatch.setattr(limits, "timeout_s", 0.1)
    sessions = [f"late-{number}" for number in range(5)]

    async def crowd() -> list[httpx.Response]:
        async with client_of(url) as client:
            stuck, writer = await begin(url, "stalled", bodies[0][0], 1000)
            posts = (client.post(f"/sessions/{sessions[i % 5]}/utterances", content=bodies[0][0]) for i in range(30))
            answers = await asyncio.gather(*posts)
            assert b" 503 " in await stuck.readline()
            writer.close()
            await until(client, (0).__eq__)
            return answers

    statuses = [answer.status_code for answer in asyncio.run(crowd())]
    assert 503 in statuses
    assert set(statuses) <= {200, 503}
    for number, session in enumerate(sessions):
        assert utterances_of(url, session) == statuses[number::5].count(200)


def test_an_outage_of_the_database_is_answered_503_and_then_over(url, database, bodies, expected):
    assert post(url, "outage", bodies[1][0]).status_code == 200
    database.kill()
    try:
        answers = [httpx.get(f"{url}/{at}") for at in ("sessions/outage", "ready")]
        answers.append(post(url, "outage", bodies[1][1]))
        assert httpx.get(f"{url}/health").status_code == 200
    finally:
        database.start()
    assert [answer.status_code for answer in answers] == [503] * 3
    assert "127.0.0.1" not in "".join(answer.text for answer in answers)  # its address is for the log only
    answer = post(url, "outage", bodies[1][1]).json()
    assert answer["utterance"] == 2
    assert answer["probabilities"] == pytest.approx(expected[1][1], abs=1e-5)


def test_an_unsaved_state_of_one_replica_does_not_overwrite_that_of_another(url, replica, database, bodies):
    other = replica.wait()
    with read_only(database):
        assert [post(other, "shared", bodies[0][turn]).json()["saved"] for turn in (0, 1)] == [False, False]
        assert httpx.get(f"{other}/health").json()["unsaved"] == 1
        assert post(url, "shared", bodies[1][0]).json()["utterance"] == 1
    deadline = time.monotonic() + 60
    while (health := httpx.get(f"{other}/health").json())["unsaved"]:  # it tries again by itself
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert health["lost"] == 1
    assert "session 'shared'" in replica.log.read_text()
    answer = post(other, "shared", bodies[0][1]).json()
    assert (answer["utterance"], answer["saved"]) == (2, True)
    assert utterances_of(url, "shared") == 2


def test_sigterm_answers_running_requests_and_saves_states_so_that_another_replica_continues(
    url, replica, database, bodies, expected
):
    old = replica.wait()
    with read_only(database):
        assert not post(old, "unsaved", bodies[0][0]).json()["saved"]

    async def stop() -> list[httpx.Response]:
        async with client_of(old) as client:
            posts = (client.post(f"/sessions/last-{n}/utterances", content=bodies[n][0]) for n in range(5))
            tasks = [asyncio.create_task(post) for post in posts]
            while (await client.get("/health")).json()["pending"] + sum(task.done() for task in tasks) < 5:
                await asyncio.sleep(0.005)
            replica.process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*tasks)

    answers = asyncio.run(stop())
    assert replica.process.wait(timeout=60) == 0
    assert "Traceback" not in replica.log.read_text()
    assert [answer.status_code for answer in answers] == [200] * 5
    for session, number in [("unsaved", 0), *((f"last-{number}", number) for number in range(5))]:
        answer = post(url, session, bodies[number][1]).json()
        assert answer["utterance"] == 2
        assert answer["probabilities"] == pytest.approx(expected[number][1], abs=1e-5)
