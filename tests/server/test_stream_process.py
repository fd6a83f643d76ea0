"""Live streams to `mal-adapter serve` as a process: SIGTERM, its log, and many callers in real time."""

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection

from mal_adapter.stores import FolderStore
from tests.ser.live import messages as provided
from tests.ser.live.calls import make_call, mulaw
from tests.server.calling import FINISH, Received, blocks, call, dial, listen
from tests.server.running import Command, send
from tests.stores.servers import wait_until

pytestmark = pytest.mark.slow

KEYS = {"acme": "the-secret-key-of-acme-0", "globex": "the-secret-key-of-globex"}
MULAW = "?encoding=mulaw&sampling_rate=8000"


@contextlib.contextmanager
def running(folder: Path, *options: object) -> Iterator[Command]:
    folder.mkdir(exist_ok=True)
    command = Command(folder, *options)
    try:
        yield command.wait()
    finally:
        command.kill()


@pytest.fixture(scope="module")
def spoken_call() -> tuple[bytes, int]:
    """A call of four turns in µ-law, and the place in which the second turn is spoken."""
    samples, said = make_call(turns=4, channels=1)
    return mulaw(samples[:, 0]), round((said[1].start_s + said[1].end_s) / 2 * 8_000)


def test_sigterm_answers_what_was_said_and_saves_it(tmp_path: Path, spoken_call: tuple[bytes, int]):
    data, middle = spoken_call
    store = tmp_path / "sessions"
    with running(tmp_path / "one", "--store", store, "--drain-s", 60) as command, contextlib.ExitStack() as open_:
        clients = [open_.enter_context(dial(command.port, f"/sessions/s{n}/stream{MULAW}")) for n in range(3)]
        watcher = open_.enter_context(dial(command.port, "/sessions/s0/watch"))
        for client in clients:
            for block in blocks(data[:middle], 160):
                client.send(block)
        received: dict[int, Received] = {}

        def hear(number: int, client: ClientConnection) -> None:
            received[number] = listen(client)

        threads = [threading.Thread(target=hear, args=each) for each in enumerate([*clients, watcher])]
        for thread in threads:
            thread.start()
        wait_until(lambda: all(send(command.port, "GET", f"/sessions/s{n}").status == 200 for n in range(3)))
        command.process.send_signal(signal.SIGTERM)
        wait_until(lambda: command.process.poll() is not None or len(received) == 4)
        for thread in threads:
            thread.join()
        assert command.process.wait(timeout=30) == 0
        assert "Traceback" not in command.log.read_text()
    for number in range(3):
        one = received[number]
        assert (one.code, one.end["reason"]) == (1012, "draining")
        assert [turn["utterance"] for turn in one.turns] == [1, 2]
        assert all(turn["saved"] for turn in one.turns)
        stored = FolderStore(store).get(f"s{number}")
        assert stored is not None
        assert int(stored.state.utterances) == 2
    assert received[3].code == 1012


def test_new_streams_are_refused_in_a_drain(tmp_path: Path, spoken_call: tuple[bytes, int]):
    with running(tmp_path / "one", "--drain-s", 60) as command:
        body = b"RIFF" + bytes(2_000)
        stalled = socket.create_connection(("127.0.0.1", command.port), timeout=60)
        stalled.sendall(
            f"POST /sessions/x/utterances HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        )
        wait_until(lambda: send(command.port, "GET", "/health").json["pending"] == 1)
        command.process.send_signal(signal.SIGTERM)
        wait_until(lambda: send(command.port, "GET", "/health").json["status"] == "draining")
        for path in (f"/sessions/y/stream{MULAW}", "/media-streams/twilio", "/sessions/y/watch"):
            with pytest.raises(InvalidStatus) as refused:
                dial(command.port, path)
            assert refused.value.response.status_code == 503
            assert json.loads(refused.value.response.body or b"")["type"] == "draining"
        stalled.close()
        assert command.process.wait(timeout=30) == 0


def test_limits_are_options_and_neither_keys_nor_ids_are_in_uvicorns_lines(
    tmp_path: Path, spoken_call: tuple[bytes, int]
):
    data, _ = spoken_call
    keys = tmp_path / "keys.txt"
    keys.write_text("".join(f"{name} {key}\n" for name, key in KEYS.items()))
    options = ("--api-keys", keys, "--max-streams", 1, "--max-message-bytes", 4_000, "--idle-s", 5)
    with running(tmp_path / "one", *options, "--max-stream-s", 3) as command:
        header = {"additional_headers": {"Authorization": f"Bearer {KEYS['acme']}"}}
        path = f"/sessions/patient-Ann/stream{MULAW}"
        with dial(command.port, path, **header):
            with pytest.raises(InvalidStatus) as refused:
                dial(command.port, path, **header)
            assert refused.value.response.status_code == 503
        protocols = ["mal-adapter", f"bearer.{KEYS['globex']}"]
        first = json.dumps({"type": "authorize", "api_key": KEYS["globex"]})
        tracks = {"inbound": data[:4_000]}
        sent = provided.twilio(tracks, {"api_key": KEYS["acme"]}, call="CA-Ann")
        for number, (where, messages, options_, code) in enumerate(
            [
                (path, blocks(data, 4_000), header, 1008),
                (path, [bytes(4_001)], header, 1009),
                (path, [data[:2_000], FINISH], {"subprotocols": protocols}, 1000),
                (path, [first, FINISH], {}, 1000),
                ("/media-streams/twilio", sent, {}, 1000),
            ]
        ):
            # The one before still counts for a moment after its end.
            wait_until(lambda number=number: len(requests(command)) == number + 2)
            assert call(command.port, where, messages, **options_).code == code
        wait_until(lambda: len(requests(command)) == 7)
        log = command.log.read_text()
        assert not [key for key in KEYS.values() if key in log]
        assert "encoding=mulaw" not in log
        assert "api_key" not in log
        outside = [line for line in command.lines() if "Ann" in json.dumps(line) and line["message"] != "request"]
        assert outside == []
        by_reason = {line["reason"]: line for line in requests(command) if "reason" in line}
        assert by_reason["too_long"]["route"] == "/sessions/{session_id}/stream"
        assert by_reason["too_long"]["status"] == 101
        assert by_reason["too_long"]["tenant"] == "acme"
        assert by_reason["too_long"]["audio_s"] >= 3
        assert by_reason["busy"]["status"] == 503
        assert {line["method"] for line in requests(command)} == {"WEBSOCKET"}


def requests(command: Command) -> list[dict[str, Any]]:
    return [line for line in command.lines() if line["message"] == "request" and line["method"] == "WEBSOCKET"]


def test_callers_in_real_time_are_answered_soon_and_as_if_alone(tmp_path: Path):
    """Eight callers who speak for six seconds; tests/benchmarks/streaming.py has fifty."""
    data = [mulaw(make_call(turns=3, seed=seed, channels=1)[0][:, 0])[: 8_000 * 8] for seed in range(4)]
    with running(tmp_path / "one") as command:
        alone = [
            call(command.port, f"/sessions/alone-{n}/stream{MULAW}", [*blocks(one, 1_600), FINISH])
            for n, one in enumerate(data)
        ]
        received: dict[int, Received] = {}

        def speak(number: int) -> None:
            with dial(command.port, f"/sessions/call-{number}/stream{MULAW}") as client:
                began = time.monotonic()
                for place, block in enumerate(blocks(data[number % 4], 160)):
                    client.send(block)
                    time.sleep(max(0.0, began + place / 50 - time.monotonic()))
                client.send(FINISH)
                received[number] = listen(client)

        threads = [threading.Thread(target=speak, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    keys = ("start_s", "end_s", "utterance", "emotion", "overlaps")
    for number, one in received.items():
        expected = alone[number % 4].turns
        assert len(expected) >= 2
        assert [[turn[key] for key in keys] for turn in one.turns] == [[turn[key] for key in keys] for turn in expected]
        for turn, same in zip(one.turns, expected, strict=True):
            assert turn["probabilities"] == pytest.approx(same["probabilities"], abs=1e-5)
        for turn in one.turns[:-1]:  # the last one's pause may be cut short
            assert 0.25 < turn["delay_s"] < 5
