"""`mal-adapter serve` as a process: SIGTERM during load, two replicas over one folder, slow and hostile clients, its
log and its metrics."""

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mal_adapter.stores import FolderStore
from tests.commands import mal_adapter
from tests.server.running import Command, Reply, send
from tests.stores.servers import wait_until

pytestmark = pytest.mark.slow

KEYS = {"acme": "the-secret-key-of-acme-0", "globex": "the-secret-key-of-globex"}


@contextlib.contextmanager
def starting(folder: Path, *options: object) -> Iterator[Command]:
    folder.mkdir(exist_ok=True)
    command = Command(folder, *options)
    try:
        yield command
    finally:
        command.kill()


@contextlib.contextmanager
def running(folder: Path, *options: object) -> Iterator[Command]:
    with starting(folder, *options) as command:
        yield command.wait()


@pytest.fixture(scope="module")
def sound(spoken: list[Any]) -> bytes:
    return spoken[0].utterances[0].audio.read_bytes()


def metrics(port: int) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """All samples."""
    text = send(port, "GET", "/metrics").body.decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}


def begin(port: int, path: str, body: bytes, sent: int) -> socket.socket:
    """A POST of which `sent` bytes are sent."""
    client = socket.create_connection(("127.0.0.1", port), timeout=60)
    client.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body[:sent])
    return client


def test_sigterm_during_load_answers_what_runs_refuses_what_is_new_and_loses_nothing(tmp_path: Path, sound: bytes):
    store = tmp_path / "sessions"
    with running(tmp_path / "one", "--store", store, "--drain-s", 60) as command:
        port = command.port
        stalled = begin(port, "/sessions/stalled/utterances", sound, 1000)
        wait_until(lambda: send(port, "GET", "/health").json["pending"] == 1)
        outcomes: list[tuple[str, Reply | None]] = []
        stop = threading.Event()

        def call(name: str) -> None:
            while not stop.is_set():
                try:
                    reply = send(port, "POST", f"/sessions/{name}/utterances", sound)
                except OSError:  # the server has ended
                    reply = None
                outcomes.append((name, reply))
                if reply is None:
                    return

        threads = [threading.Thread(target=call, args=(f"load-{n}",)) for n in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(outcomes) > 40)
        command.process.send_signal(signal.SIGTERM)
        wait_until(lambda: send(port, "GET", "/health").json["status"] == "draining")
        for method, path in (("GET", "/ready"), ("POST", "/sessions/new/utterances"), ("GET", "/sessions/load-0")):
            refused = send(port, method, path, sound if method == "POST" else None)
            assert (refused.status, refused.json["type"]) == (503, "draining")
            assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
        assert send(port, "GET", "/metrics").status == 200
        assert command.process.poll() is None, "an upload is under way"
        stalled.sendall(sound[1000:])
        assert stalled.recv(12) == b"HTTP/1.1 200"
        assert command.process.wait(timeout=30) == 0
        stop.set()
        for thread in threads:
            thread.join()
        assert "Traceback" not in command.log.read_text()
    replies = [reply for _, reply in outcomes if reply is not None]
    assert {reply.status for reply in replies} == {200, 503}
    assert {reply.json["type"] for reply in replies if reply.status == 503} == {"draining"}
    # Answered exactly if written; a broken connection may be either, and a new one was refused before it.
    kept = FolderStore(store)
    for number in range(8):
        name = f"load-{number}"
        answered = [reply.json["utterance"] for who, reply in outcomes if who == name and reply and reply.status == 200]
        assert answered == list(range(1, len(answered) + 1))
        stored = kept.get(name)
        assert stored is not None
        assert int(stored.state.utterances) == len(answered)
    assert "new" not in list(kept)
    assert "stalled" in list(kept)


def test_a_request_that_does_not_end_is_dropped_and_the_exit_code_says_so(tmp_path: Path, sound: bytes):
    with running(tmp_path / "one", "--drain-s", 0.5) as command:
        client = begin(command.port, "/sessions/stalled/utterances", sound, 1000)
        wait_until(lambda: send(command.port, "GET", "/health").json["pending"] == 1)
        began = time.monotonic()
        command.process.send_signal(signal.SIGTERM)
        assert command.process.wait(timeout=30) == 1
        assert time.monotonic() - began < 15
        client.close()
        assert any("1 requests have not ended" in line["message"] for line in command.lines())


def test_a_second_signal_drops_requests_at_once_and_saves_sessions(tmp_path: Path, sound: bytes):
    with running(tmp_path / "one", "--drain-s", 600, "--store", tmp_path / "sessions") as command:
        assert send(command.port, "POST", "/sessions/saved/utterances", sound).status == 200
        client = begin(command.port, "/sessions/stalled/utterances", sound, 1000)
        wait_until(lambda: send(command.port, "GET", "/health").json["pending"] == 1)
        command.process.send_signal(signal.SIGINT)
        wait_until(lambda: send(command.port, "GET", "/health").json["status"] == "draining")
        command.process.send_signal(signal.SIGINT)
        assert command.process.wait(timeout=30) == 1
        client.close()
        assert list(FolderStore(tmp_path / "sessions")) == ["saved"]


def test_two_replicas_over_one_folder_continue_each_others_sessions(tmp_path: Path, spoken, recognizer_on):
    bodies = [utterance.audio.read_bytes() for utterance in spoken[1].utterances]
    expected = [result.probabilities for result in recognizer_on().recognize(spoken[1])]
    options = ("--store", tmp_path / "sessions")
    with starting(tmp_path / "one", *options) as one, starting(tmp_path / "two", *options) as two:
        one.wait(), two.wait()
        for number, body in enumerate(bodies):
            reply = send((one, two)[number % 2].port, "POST", "/sessions/x/utterances", body).json
            assert reply["utterance"] == number + 1
            assert reply["probabilities"] == pytest.approx(expected[number], abs=1e-5)
        # Both at once: each utterance is written exactly if it is answered, and a conflict is of that session only.
        with ThreadPoolExecutor(16) as pool:
            ports = [one.port, two.port]
            posts = [
                (
                    f"shared-{n % 4}",
                    pool.submit(send, ports[n % 2], "POST", f"/sessions/shared-{n % 4}/utterances", bodies[0]),
                )
                for n in range(32)
            ] + [
                (f"own-{n}", pool.submit(send, ports[n % 2], "POST", f"/sessions/own-{n}/utterances", bodies[0]))
                for n in range(8)
            ]
        replies = [(name, post.result()) for name, post in posts]
        for name, reply in replies:
            assert reply.status == 200 or (reply.status, reply.json["type"]) == (409, "session_conflict")
            assert reply.status == 200 or name.startswith("shared")
        for name in {name for name, _ in replies}:
            answered = sum(who == name and reply.status == 200 for who, reply in replies)
            assert send(one.port, "GET", f"/sessions/{name}").json["utterances"] == answered
        conflicts = sum(reply.status == 409 for _, reply in replies)
        counted = [metrics(each.port)["mal_adapter_conflicts_total", frozenset()] for each in (one, two)]
        assert sum(counted) == conflicts
        for each in (one, two):
            each.process.send_signal(signal.SIGTERM)
        assert [each.process.wait(timeout=30) for each in (one, two)] == [0, 0]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    folder = tmp_path_factory.mktemp("keyed")
    (folder / "keys").write_text("".join(f"{name} {key}\n" for name, key in KEYS.items()))
    limits = ("--timeout-s", 1.5, "--max-bytes", 2**20, "--wait-ms", 0)
    with running(folder, "--api-keys", folder / "keys", *limits) as command:
        yield command


def post(command: Command, session: str, body: Any, tenant: str = "acme") -> Reply:
    headers = {"Authorization": f"Bearer {KEYS[tenant]}"}
    return send(command.port, "POST", f"/sessions/{session}/utterances", body, headers)


def test_the_log_has_a_line_per_request_without_audio_and_keys(keyed: Command, sound: bytes):
    assert keyed.started["tenants"] == list(KEYS)
    before = len([line for line in keyed.lines() if line["message"] == "request"])
    assert post(keyed, "a%0A%22%E2%80%AE%2Fb", sound).status == 200
    assert post(keyed, "x", b"secret words of the caller").status == 415
    assert (
        send(keyed.port, "GET", "/secret-path?secret=query", None, {"Authorization": "Bearer wrong-key"}).status == 404
    )
    assert send(keyed.port, "GET", "/sessions", None, {"Authorization": "Bearer wrong-key"}).status == 403
    wait_until(lambda: len([line for line in keyed.lines() if line["message"] == "request"]) >= before + 4)
    lines = [line for line in keyed.lines() if line["message"] == "request"][before:]
    assert [(line["route"], line["status"]) for line in lines] == [
        ("/sessions/{session_id}/utterances", 200),
        ("/sessions/{session_id}/utterances", 415),
        ("other", 404),
        ("/sessions", 403),
    ]
    first = lines[0]
    assert first["session"] == 'a\n"\u202e/b'
    assert (first["tenant"], first["bytes"], first["batch"], first["saved"]) == ("acme", len(sound), 1, True)
    assert first["elapsed_ms"] > 0
    text = keyed.log.read_text()
    assert text.isascii()
    assert all(json.loads(line) for line in text.splitlines() if "uvicorn" in line or "request" in line)
    for secret in ("secret", "wrong-key", *KEYS.values(), "RIFF"):
        assert secret not in text


def test_metrics_count_requests_batches_and_sessions(keyed: Command, sound: bytes):
    def counted(name: str, **labels: str) -> float:
        return metrics(keyed.port).get((f"mal_adapter_{name}", frozenset(labels.items())), 0.0)

    route = "/sessions/{session_id}/utterances"
    answered = {"method": "POST", "route": route, "status": "200"}
    before = [counted("requests_total", **answered), counted("batch_size_sum"), counted("sessions")]
    for number in range(3):
        assert post(keyed, f"metrics-{number}", sound).status == 200
    after = [counted("requests_total", **answered), counted("batch_size_sum"), counted("sessions")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 3, 3]
    assert counted("request_seconds_count", method="POST", route=route) >= 3
    assert counted("request_seconds_sum", method="POST", route=route) > 0
    for gauge in ("queue_length", "pending_requests", "unsaved_sessions", "lost_states", "conflicts_total"):
        assert ("mal_adapter_" + gauge, frozenset()) in metrics(keyed.port)
        assert counted(gauge) == 0
    for odd in ("GET /x/%0a{}", "BREW /y", "PUT /z"):
        method, path = odd.split()
        assert send(keyed.port, method, path).status in (404, 405)
    routes = {dict(labels).get("route", "other") for _, labels in metrics(keyed.port)}
    assert "other" in routes
    assert not any(name in "".join(routes) for name in ("/x", "/y", "/z")), "or clients could make any number of them"
    assert not any(tenant in str(metrics(keyed.port)) for tenant in KEYS)


def test_hostile_bodies_are_refused_and_the_server_goes_on(keyed: Command, sound: bytes):
    acme = {"Authorization": f"Bearer {KEYS['acme']}"}
    for body in (b"", b"\0" * 5000, sound[:40], sound[:44], sound[:3000], b"RIFF" + b"\xff" * 5000, sound[::-1]):
        assert post(keyed, "hostile", body).status in (415, 422), body[:10]
    for lengths in ("9" * 30, "1048577", "-1", "1e3", "1_0", "٣"):
        with contextlib.closing(socket.create_connection(("127.0.0.1", keyed.port), timeout=60)) as client:
            key = f"Authorization: Bearer {KEYS['acme']}"
            head = (
                f"POST /sessions/hostile/utterances HTTP/1.1\r\nHost: x\r\n{key}\r\nContent-Length: {lengths}\r\n\r\n"
            )
            client.sendall(head.encode())
            assert client.recv(12) in (b"HTTP/1.1 400", b"HTTP/1.1 413")
    for body in (
        b"",
        b"{}",
        b'{"to": 1}',
        b'{"to": null}',
        b"[" * 20_000,
        b'{"to": "\\ud800"}',
        b'{"to": ""}',
        b"\xff",
        b'"to"',
    ):
        reply = send(keyed.port, "POST", "/sessions/hostile/fork", body, acme)
        assert (reply.status, reply.json["type"]) in {(422, "invalid_request"), (400, "invalid_session_id")}, body
    assert post(keyed, "source", sound).status == 200
    state = send(keyed.port, "GET", "/states/source", None, acme).body
    damaged = [state[:-1], state[1:], state[:100], b"", b"\xff" * 64, bytes(2**16), state[:8] + b"x" + state[9:]]
    weights = state.index(b"}", len(state) // 2) if b"}" in state[len(state) // 2 :] else len(state) - 64
    damaged.append(state[:weights] + b"\xff\xff\xff\x7f" * 8 + state[weights + 32 :])  # NaN
    for body in damaged:
        reply = send(keyed.port, "PUT", "/states/hostile", body, acme)
        assert (reply.status, reply.json["type"]) == (422, "bad_state"), body[:20]
    for path in ("/sessions/hostile", "/states/hostile"):
        assert send(keyed.port, "GET", path, None, acme).status == 404, "nothing of it was kept"
    assert post(keyed, "source", sound).json["utterance"] == 2
    assert not [line for line in keyed.lines() if line["level"] == "error"]


def test_slow_uploads_end_and_delay_no_other_session(keyed: Command, sound: bytes):
    key = f"POST /sessions/slow-%d/utterances HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS['acme']}\r\n"
    clients = []
    for number in range(20):
        client = socket.create_connection(("127.0.0.1", keyed.port), timeout=60)
        client.sendall((key % number + f"Content-Length: {len(sound)}\r\n\r\n").encode() + sound[:500])
        clients.append(client)
    wait_until(lambda: send(keyed.port, "GET", "/health").json["pending"] == 20)
    assert post(keyed, "quick", sound).status == 200
    for client in clients:
        assert client.recv(12) == b"HTTP/1.1 503"
        client.close()
    wait_until(lambda: send(keyed.port, "GET", "/health").json["pending"] == 0)
    listed = send(keyed.port, "GET", "/sessions?after=slow", None, {"Authorization": f"Bearer {KEYS['acme']}"}).json
    assert not [session for session in listed["sessions"] if session.startswith("slow-")]


def test_all_bodies_are_counted_before_they_are_read(keyed: Command):
    """Or their number times --max-bytes would not be the limit of the memory that they take."""
    head = f"HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS['acme']}\r\nContent-Length: 1000000\r\n\r\n"
    with contextlib.ExitStack() as clients:
        requests = ["POST /sessions/%d/utterances", "POST /sessions/%d/fork", "PUT /states/%d"] * 25
        for number, request in enumerate(requests):
            client = clients.enter_context(socket.create_connection(("127.0.0.1", keyed.port), timeout=60))
            client.sendall(f"{request % number} {head}".encode() + b"x" * 1000)
            if number >= 64:
                assert client.recv(12) == b"HTTP/1.1 503"
            elif number == 63:
                wait_until(lambda: send(keyed.port, "GET", "/health").json["pending"] == 64)
    wait_until(lambda: send(keyed.port, "GET", "/health").json["pending"] == 0)


def test_fork_download_and_upload_continue_a_session(keyed: Command, spoken: list[Any]):
    acme, globex = ({"Authorization": f"Bearer {KEYS[name]}"} for name in ("acme", "globex"))
    bodies = [utterance.audio.read_bytes() for utterance in spoken[2].utterances]
    for body in bodies[:2]:
        assert post(keyed, "call/1", body).status == 200
    fork = send(keyed.port, "POST", "/sessions/call%2F1/fork", b'{"to": "what if/\\u00e9"}', acme)
    assert (fork.status, fork.json["session"], fork.json["utterances"]) == (201, "what if/é", 2)
    state = send(keyed.port, "GET", "/states/call/1", None, acme)
    assert (state.status, state.headers["content-type"]) == (200, "application/octet-stream")
    assert send(keyed.port, "PUT", "/states/copy", state.body, globex).status == 201
    third = [
        post(keyed, "call/1", bodies[2]).json,
        post(keyed, "what%20if/%C3%A9", bodies[2]).json,
        post(keyed, "copy", bodies[2], "globex").json,
    ]
    assert [reply["utterance"] for reply in third] == [3, 3, 3]
    for reply in third[1:]:
        assert reply["probabilities"] == pytest.approx(third[0]["probabilities"], abs=1e-5)
    again = send(keyed.port, "POST", "/sessions/call/1/fork", b'{"to": "what if/\xc3\xa9"}', acme)
    assert (again.status, again.json["type"]) == (409, "session_exists")
    itself = send(keyed.port, "POST", "/sessions/call/1/fork", b'{"to": "call/1"}', acme)
    assert itself.status == 409
    assert send(keyed.port, "GET", "/states/none", None, acme).json["type"] == "session_not_found"


def test_wrong_usage_is_found_before_the_model_is_loaded(tmp_path: Path):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        done = mal_adapter("serve", "--port", port, "--json")
    assert done.exit_code == 2
    assert str(port) in json.loads(done.stdout)["error"]["message"]
    (tmp_path / "keys").write_text("acme short\n")
    for wrong in (
        ["--batch", 0],
        ["--wait-ms", -1],
        ["--timeout-s", 0],
        ["--drain-s", "nan"],
        ["--api-keys", tmp_path / "keys"],
        ["--api-keys", tmp_path / "none"],
        ["--model", "a-model-without-adapter"],
        ["--host", "no.such.host.invalid"],
        ["--store", "http://host"],
        ["--ttl-s", -5],
        ["--port", 70_000],
    ):
        done = mal_adapter("serve", *wrong)
        assert (done.exit_code, done.stdout) == (2, ""), wrong
