"""Live streams over WebSockets: the turns of a call, whoever else calls, and clean ends in every case."""

import contextlib
import hashlib
import json
import socket as sockets
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import ConnectionClosed, InvalidStatus

from mal_adapter.errors import SessionConflictError, StoreError
from mal_adapter.ser.live.codecs import Decoder
from mal_adapter.ser.recognizer import EmotionRecognizer, Prediction
from mal_adapter.server import ApiKeys, Limits, make_app
from mal_adapter.server import stream_worker as worker_module
from mal_adapter.server.tenant_store import TenantStore
from mal_adapter.stores import InMemoryStore
from tests.ser.live import messages as provided
from tests.ser.live.calls import make_call, mulaw
from tests.server.calling import FINISH, Received, blocks, call, dial, listen
from tests.server.running import in_thread, send
from tests.stores.servers import wait_until

KEYS = {"acme": "the-secret-key-of-acme-0", "globex": "the-secret-key-of-globex"}
MULAW = "?encoding=mulaw&sampling_rate=8000"
PLACES = ("speaker", "channel", "start_s", "end_s", "overlaps")


@pytest.fixture
def limits() -> Limits:
    return Limits()


@pytest.fixture
def recognizer(recognizer_on: Any) -> EmotionRecognizer:
    return recognizer_on()


@pytest.fixture
def port(recognizer: EmotionRecognizer, limits: Limits) -> Iterator[int]:
    with in_thread(make_app(recognizer, recognizer.memory, limits)) as port:
        yield port


@pytest.fixture(scope="module")
def spoken_call() -> tuple[bytes, int]:
    """A call of four turns in µ-law, and the place in which the second turn is spoken."""
    samples, said = make_call(turns=4, channels=1)
    return mulaw(samples[:, 0]), round((said[1].start_s + said[1].end_s) / 2 * 8_000)


def expected(recognizer: EmotionRecognizer, samples: Any, rate: int, **options: Any) -> list[dict[str, Any]]:
    """The turns by the library itself, without a server."""
    found = []
    for number, entry in enumerate(recognizer.stream(rate, **options).entries([samples])):
        assert isinstance(entry.result, Prediction)
        turn = entry.turn
        place = [turn.speaker, turn.channel, round(turn.start_s, 3), round(turn.end_s, 3), turn.overlaps]
        found.append(
            dict(zip(PLACES, place, strict=True))
            | {"emotion": entry.emotion, "probabilities": entry.result.probabilities, "utterance": number + 1}
        )
    return found


def assert_same(received: Received, turns: list[dict[str, Any]]) -> None:
    assert [{key: turn[key] for key in (*PLACES, "emotion", "utterance")} for turn in received.turns] == [
        {key: turn[key] for key in (*PLACES, "emotion", "utterance")} for turn in turns
    ]
    for one, other in zip(received.turns, turns, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


@pytest.mark.parametrize(("encoding", "rate"), [("pcm16", 8_000), ("pcm16", 16_000), ("mulaw", 8_000), ("alaw", 8_000)])
def test_a_stream_gets_the_turns_of_its_call(port: int, recognizer: EmotionRecognizer, encoding: str, rate: int):
    samples, _ = make_call(rate, turns=5)
    if encoding == "pcm16":
        data = np.round(samples * 32_767).astype("<i2").tobytes()
    else:
        codes = Decoder(encoding)(bytes(range(256)))[:, 0]
        data = np.abs(samples[..., np.newaxis] - codes).argmin(-1).astype(np.uint8).tobytes()
    turns = expected(recognizer, Decoder(encoding, 2)(data), rate, channels=["customer", "agent"], session_id="alone")
    assert len(turns) == 5
    path = f"/sessions/call%2F42/stream?encoding={encoding}&sampling_rate={rate}&channels=customer,agent"
    received = call(port, path, [*blocks(data, 1_001), FINISH])
    assert_same(received, turns)
    assert received.code == 1000
    assert received.messages[0] == {
        "type": "ready", "session": "call/42", "encoding": encoding, "sampling_rate": rate,
        "channels": ["customer", "agent"],
    }  # fmt: skip
    assert received.end == {"type": "end", "reason": "finished", "turns": 5, "audio_s": round(len(samples) / rate, 3)}
    assert all(turn["session"] == "call/42" and turn["saved"] and turn["audio_s"] > 1 for turn in received.turns)
    kinds = [message["type"] for message in received.messages[1:-1]]
    assert kinds == ["speech_started", "turn"] * 5
    for started, turn in zip(received.of("speech_started"), received.turns, strict=True):
        assert started["speaker"] == turn["speaker"]
        assert started["start_s"] == pytest.approx(turn["start_s"] + 0.1, abs=1e-3)
    assert send(port, "GET", "/sessions/call%2F42").json["utterances"] == 5


def test_delays_are_measured(port: int, spoken_call: tuple[bytes, int]):
    """In real time, the answer comes a third of a second after the voice: the pause that shows its end, and some."""
    data, _ = spoken_call
    with dial(port, f"/sessions/x/stream{MULAW}") as client:
        began = time.monotonic()
        for number, block in enumerate(blocks(data[: 8_000 * 6], 160)):
            client.send(block)
            time.sleep(max(0.0, began + number / 50 - time.monotonic()))
        client.send(FINISH)
        received = listen(client)
    assert len(received.turns) >= 1
    for turn in received.turns:
        assert 0.25 < turn["delay_s"] < 5


def test_many_streams_are_not_mixed(port: int, recognizer: EmotionRecognizer):
    calls = [make_call(turns=3, seed=seed, channels=1)[0] for seed in range(6)]
    data = [mulaw(samples[:, 0]) for samples in calls]
    alone = [expected(recognizer, Decoder("mulaw")(one), 8_000) for one in data]
    with ThreadPoolExecutor(len(data)) as threads:
        paths = [f"/sessions/call-{number}/stream{MULAW}" for number in range(len(data))]
        received = list(threads.map(lambda path, one: call(port, path, [*blocks(one, 160), FINISH]), paths, data))
    for one, turns in zip(received, alone, strict=True):
        assert len(turns) == 3
        assert_same(one, turns)


def test_a_stream_continues_its_session_and_has_it_alone(
    port: int, limits: Limits, spoken_call: tuple[bytes, int], spoken: list[Any]
):
    data, middle = spoken_call
    sound = spoken[0].utterances[0].audio.read_bytes()
    assert send(port, "POST", "/sessions/x/utterances", sound).json["utterance"] == 1
    with dial(port, f"/sessions/x/stream{MULAW}") as client:
        client.send(data[:middle])
        assert json.loads(client.recv(timeout=60))["type"] == "ready"
        assert refused(port, f"/sessions/x/stream{MULAW}") == (409, "session_busy")
        limits.timeout_s = 0.5
        late = send(port, "POST", "/sessions/x/utterances", sound)
        assert (late.status, late.json["type"]) == (503, "timeout")
        limits.timeout_s = 30.0
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(send, port, "POST", "/sessions/x/utterances", sound)
            client.send(FINISH)
            received = listen(client)
            assert [turn["utterance"] for turn in received.turns] == [2, 3]
            assert waiting.result().json["utterance"] == 4
    again = call(port, f"/sessions/x/stream{MULAW}", [*blocks(data, 4_000), FINISH])
    assert [turn["utterance"] for turn in again.turns] == [5, 6, 7, 8]


@pytest.mark.parametrize("abruptly", [False, True])
def test_a_client_that_goes_is_answered_and_written(port: int, spoken_call: tuple[bytes, int], abruptly: bool):
    data, middle = spoken_call
    with dial(port, f"/sessions/gone/stream{MULAW}") as client:
        for block in blocks(data[:middle], 160):
            client.send(block)
        wait_until(lambda: json.loads(client.recv(timeout=60))["type"] == "turn")
        if abruptly:  # the connection is reset, without a word
            client.socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, struct.pack("ii", 1, 0))
            client.socket.close()
    wait_until(lambda: send(port, "GET", "/sessions/gone").json["utterances"] == 2)
    received = call(port, f"/sessions/gone/stream{MULAW}", [FINISH])
    assert received.end["turns"] == 0


def test_a_bad_message_ends_the_stream_after_what_was_said(port: int, spoken_call: tuple[bytes, int]):
    data, middle = spoken_call
    for number, bad in enumerate(("hello", "{}", '{"type": "media"}', "[" * 10_000)):
        received = call(port, f"/sessions/bad-{number}/stream{MULAW}", [data[:middle], bad])
        assert received.code == 1007
        assert [error["error"]["type"] for error in received.of("error")] == ["bad_message"]
        assert len(received.turns) == 2
        assert received.end["reason"] == "bad_message"


def test_limits_end_a_stream_after_what_was_said(
    port: int, limits: Limits, spoken_call: tuple[bytes, int], recognizer: EmotionRecognizer
):
    data, middle = spoken_call
    limits.max_message_bytes = 1_000
    received = call(port, f"/sessions/large/stream{MULAW}", [*blocks(data[:middle], 1_000), bytes(1_001)])
    assert (received.code, received.end["reason"], len(received.turns)) == (1009, "too_large", 2)
    limits.max_stream_s = middle / 8_000 - 0.2
    with dial(port, f"/sessions/long/stream{MULAW}") as client:
        with contextlib.suppress(ConnectionClosed):
            for block in blocks(data * 100, 1_000):
                client.send(block)
        received = listen(client)
    assert (received.code, received.end["reason"], len(received.turns)) == (1008, "too_long", 2)
    limits.max_stream_s, limits.idle_s = 1000.0, 0.4
    received = call(port, f"/sessions/idle/stream{MULAW}", blocks(data[:middle], 1_000))
    assert (received.code, received.end["reason"], len(received.turns)) == (1008, "idle", 2)
    limits.idle_s, limits.max_streams = 60.0, 1
    with dial(port, f"/sessions/one/stream{MULAW}"):
        for path in (f"/sessions/two/stream{MULAW}", "/sessions/one/watch", "/media-streams/twilio"):
            refusal = refused(port, path)
            assert refusal == (503, "busy")
    wait_until(lambda: metric(port, "mal_adapter_streams") == 0)
    assert call(port, f"/sessions/two/stream{MULAW}", [FINISH]).code == 1000


def refused(port: int, path: str, **options: Any) -> tuple[int, str]:
    """(The status, the type) of a WebSocket that is not accepted."""
    with pytest.raises(InvalidStatus) as error:
        dial(port, path, **options)
    response = error.value.response
    return response.status_code, json.loads(response.body or b"{}")["type"]


def metric(port: int, name: str) -> float:
    families = text_string_to_metric_families(send(port, "GET", "/metrics").body.decode())
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


@pytest.mark.parametrize(
    "query",
    [
        "encoding=opus",
        "sampling_rate=4000",
        "sampling_rate=eight",
        "sampling_rate=" + "9" * 5_000,
        "channels=a,a",
        "channels=a,,b",
        "channels=9",
        "channels=0",
        "channels=" + ",".join("abcdefghi"),
    ],
)
def test_formats_are_checked_before_the_socket_is_accepted(port: int, query: str):
    assert refused(port, f"/sessions/x/stream?{query}") == (422, "invalid_request")


def test_unknown_names_are_refused(port: int):
    assert refused(port, "/media-streams/skype") == (404, "not_found")
    assert refused(port, "/sessions/%00/stream") == (400, "invalid_session_id")
    assert refused(port, "/sessions/%00/watch") == (400, "invalid_session_id")


def test_a_client_that_is_ahead_waits_and_nothing_is_lost(
    port: int, recognizer: EmotionRecognizer, monkeypatch: pytest.MonkeyPatch
):
    """Two minutes of sound at once, to a model that is slow: what waits in the server stays small."""
    samples = np.tile(make_call(turns=4, channels=1)[0], (10, 1))
    data = mulaw(samples[:, 0])
    turns = expected(recognizer, Decoder("mulaw")(data), 8_000)
    seen = [0]
    add = worker_module.StreamInput.add

    async def watched(self: Any, block: Any) -> None:
        seen[0] = max(seen[0], self._frames + len(block))
        assert self.events.qsize() < 40
        await add(self, block)

    monkeypatch.setattr(worker_module.StreamInput, "add", watched)
    prepare = recognizer.prepare

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.1)
        return prepare(*args, **kwargs)

    monkeypatch.setattr(recognizer, "prepare", slow)
    with dial(port, f"/sessions/fast/stream{MULAW}") as client:
        threading.Thread(target=lambda: [client.send(block) for block in [*blocks(data, 1_600), FINISH]]).start()
        received = listen(client)
    assert len(turns) > 35
    assert_same(received, turns)
    assert seen[0] <= 8_000 + 1_600


def test_a_store_that_fails_is_an_error_of_the_turn_only(
    port: int, recognizer: EmotionRecognizer, spoken_call: tuple[bytes, int], monkeypatch: pytest.MonkeyPatch
):
    data, _ = spoken_call
    memory = recognizer.memory
    assert memory is not None
    opened, asked = memory.states.opened, [0]

    def failing(ids: Any) -> Any:
        asked[0] += 1
        if asked[0] == 2:
            raise StoreError("redis://10.0.0.7 is away")
        if asked[0] == 4:
            raise SessionConflictError("another replica")
        return opened(ids)

    monkeypatch.setattr(memory.states, "opened", failing)
    received = call(port, f"/sessions/x/stream{MULAW}", [*blocks(data, 4_000), FINISH])
    assert [message["type"] for message in received.messages if message["type"] in ("turn", "error")] == [
        "turn", "error", "turn", "turn",
    ]  # fmt: skip
    (error,) = received.of("error")
    assert error["error"]["type"] == "store_unavailable"
    assert "10.0.0.7" not in json.dumps(error)
    assert error["start_s"] < error["end_s"]
    assert [turn["utterance"] for turn in received.turns] == [1, 2, 3]
    assert metric(port, "mal_adapter_conflicts_total") == 1
    assert metric(port, "mal_adapter_stream_errors_total") == 1
    assert metric(port, "mal_adapter_stream_delay_seconds_count") == 3
    assert metric(port, "mal_adapter_stream_audio_seconds_total") == pytest.approx(len(data) / 8_000, abs=1e-3)
    assert received.code == 1000


def test_a_watcher_gets_the_messages_of_a_session(port: int, spoken_call: tuple[bytes, int]):
    data, _ = spoken_call
    with dial(port, "/sessions/x/watch") as watcher, dial(port, "/sessions/y/watch") as other:
        assert json.loads(watcher.recv(timeout=60)) == {"type": "ready", "session": "x"}
        assert json.loads(other.recv(timeout=60)) == {"type": "ready", "session": "y"}
        received = call(port, f"/sessions/x/stream{MULAW}", [*blocks(data, 4_000), FINISH])
        seen = [json.loads(watcher.recv(timeout=60)) for _ in received.messages[1:]]
        assert seen == received.messages[1:]
        with pytest.raises(TimeoutError):
            other.recv(timeout=0.2)


def test_a_media_stream_of_a_provider(port: int, recognizer: EmotionRecognizer):
    samples, _ = make_call(turns=4)
    tracks = {"inbound": mulaw(samples[:, 0]), "outbound": mulaw(samples[:, 1])}
    decoded = np.concatenate([Decoder("mulaw")(data) for data in tracks.values()], axis=1)
    turns = expected(recognizer, decoded, 8_000, channels=["inbound", "outbound"])
    received = call(port, "/media-streams/twilio", provided.twilio(tracks, call="CA7"))
    assert_same(received, turns)
    assert (received.code, received.end["reason"], received.messages[0]["session"]) == (1000, "finished", "CA7")
    named = [turn | {"speaker": {"inbound": "Ann", "outbound": "Bob"}[turn["speaker"]]} for turn in turns]
    received = call(port, "/media-streams/twilio", provided.twilio(tracks, {"session": "t", "channels": "Ann,Bob"}))
    assert_same(received, named)
    with dial(port, "/sessions/silent/watch") as watcher:
        watcher.recv(timeout=60)
        path = "/media-streams/telnyx?session=silent&channels=Ann,Bob&answers=false"
        received = call(port, path, provided.telnyx(tracks))
        assert received == Received([], 1000)
        seen: list[dict[str, Any]] = []
        while not seen or seen[-1]["type"] != "end":
            seen.append(json.loads(watcher.recv(timeout=60)))
        assert_same(Received(seen, None), named)
    with dial(port, "/media-streams/plivo?session=p") as client:  # Plivo says nothing at the end, and closes
        for message in provided.plivo({"inbound": tracks["inbound"]}):
            client.send(message)
    wait_until(lambda: send(port, "GET", "/sessions/p").json.get("utterances") == 2)


def test_a_media_stream_that_is_none_is_refused(port: int):
    tracks = {"inbound": bytes(8_000)}
    begin = list(provided.twilio(tracks))
    for path, sent, kind in (
        ("twilio", ["hello"], "invalid_request"),
        ("twilio", [begin[2]], "invalid_request"),
        ("twilio?channels=Ann,Bob", begin, "invalid_request"),
        ("vonage", list(provided.vonage(bytes(640))), "invalid_session_id"),
    ):
        received = call(port, f"/media-streams/{path}", sent)
        assert received.code == 1008, path
        assert [error["error"]["type"] for error in received.of("error")] == [kind]
    received = call(port, "/media-streams/twilio", [*begin[:3], "hello"])
    assert (received.code, received.end["reason"]) == (1007, "bad_message")


@pytest.fixture
def guarded(recognizer_on: Any) -> Iterator[int]:
    """A server with the keys of two tenants."""
    keys = ApiKeys([(name, hashlib.sha256(key.encode()).digest()) for name, key in KEYS.items()])
    recognizer = recognizer_on(TenantStore(list(KEYS), InMemoryStore))
    with in_thread(make_app(recognizer, recognizer.memory, Limits(), keys)) as port:
        yield port


def test_keys_come_in_a_header_a_subprotocol_or_the_first_message(guarded: int, spoken_call: tuple[bytes, int]):
    data, middle = spoken_call
    path, sound = f"/sessions/x/stream{MULAW}", [data[:middle], FINISH]
    header = {"additional_headers": {"Authorization": f"Bearer {KEYS['acme']}"}}
    assert len(call(guarded, path, sound, **header).turns) == 2
    with dial(guarded, path, subprotocols=["mal-adapter", f"bearer.{KEYS['acme']}"]) as client:
        assert client.subprotocol == "mal-adapter"
        for message in sound:
            client.send(message)
        assert [turn["utterance"] for turn in listen(client).turns] == [3, 4]
    first = json.dumps({"type": "authorize", "api_key": KEYS["globex"]})
    assert [turn["utterance"] for turn in call(guarded, path, [first, *sound]).turns] == [1, 2]
    for tenant, count in (("acme", 4), ("globex", 2)):
        reply = send(guarded, "GET", "/sessions/x", headers={"Authorization": f"Bearer {KEYS[tenant]}"})
        assert reply.json["utterances"] == count


def test_without_a_known_key_nothing_is_accepted(guarded: int, spoken_call: tuple[bytes, int]):
    data, _ = spoken_call
    for path in (f"/sessions/x/stream{MULAW}", "/sessions/x/watch", "/media-streams/twilio"):
        header = {"additional_headers": {"Authorization": "Bearer nobody-knows-this-key"}}
        assert refused(guarded, path, **header) == (403, "unknown_api_key")
        protocols = ["mal-adapter", "bearer.nobody-knows-this-key"]
        assert refused(guarded, path, subprotocols=protocols) == (403, "unknown_api_key")
    for path in (f"/sessions/x/stream{MULAW}", "/sessions/x/watch"):
        for first in (data[:100], "hello", '{"type": "authorize"}', '{"type": "authorize", "api_key": 7}', "[]"):
            received = call(guarded, path, [first])
            assert (received.code, received.of("error")[0]["error"]["type"]) == (1008, "missing_api_key")
        received = call(guarded, path, ['{"type": "authorize", "api_key": "nobody-knows-this-key"}'])
        assert (received.code, received.of("error")[0]["error"]["type"]) == (1008, "unknown_api_key")


def test_a_page_of_another_site_needs_a_key(port: int):
    own = f"http://127.0.0.1:{port}"
    assert call(port, f"/sessions/x/stream{MULAW}", [FINISH], origin=own).code == 1000
    for path in (f"/sessions/x/stream{MULAW}", "/sessions/x/watch", "/media-streams/twilio"):
        for origin in ("https://example.org", f"http://127.0.0.1:{port + 1}", "null"):
            assert refused(port, path, origin=origin) == (403, "other_origin")


def test_a_page_of_another_site_with_a_key(guarded: int):
    protocols = ["mal-adapter", f"bearer.{KEYS['acme']}"]
    received = call(
        guarded, f"/sessions/x/stream{MULAW}", [FINISH], origin="https://example.org", subprotocols=protocols
    )
    assert received.code == 1000


def test_a_provider_has_its_key_in_a_parameter(guarded: int):
    samples, _ = make_call(turns=2, channels=1)
    tracks = {"inbound": mulaw(samples[:, 0])}
    received = call(guarded, "/media-streams/twilio", provided.twilio(tracks, {"api_key": KEYS["acme"]}, call="CA8"))
    assert len(received.turns) == 2
    assert KEYS["acme"] not in json.dumps(received.messages)
    received = call(guarded, "/media-streams/twilio", list(provided.twilio(tracks))[:2])
    assert (received.code, received.of("error")[0]["error"]["type"]) == (1008, "missing_api_key")
    received = call(guarded, "/media-streams/twilio", list(provided.twilio(tracks, {"api_key": "wrong"}))[:2])
    assert (received.code, received.of("error")[0]["error"]["type"]) == (1008, "unknown_api_key")
