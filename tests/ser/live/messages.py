"""Messages as telephony providers document them; made here, for tests and benchmarks."""

import base64
import json
from collections.abc import Iterator, Mapping

CHUNK = 160
"""Bytes of 20 ms of G.711."""


def twilio(
    tracks: Mapping[str, bytes], parameters: Mapping[str, str] | None = None, call: str = "CA1"
) -> Iterator[str]:
    """All messages of a call: `tracks` has the µ-law of each track."""
    yield json.dumps({"event": "connected", "protocol": "Call", "version": "1.0.0"})
    start = {
        "accountSid": "AC1",
        "streamSid": "MZ1",
        "callSid": call,
        "tracks": list(tracks),
        "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1},
        "customParameters": dict(parameters or {}),
    }
    yield json.dumps({"event": "start", "sequenceNumber": "1", "start": start, "streamSid": "MZ1"})
    number = 1
    for place in range(0, max(map(len, tracks.values())), CHUNK):
        for track, data in tracks.items():
            number += 1
            yield twilio_media(number, track, place, data[place : place + CHUNK])
    yield json.dumps({"event": "mark", "sequenceNumber": str(number + 1), "streamSid": "MZ1", "mark": {"name": "m"}})
    dtmf = {"track": "inbound_track", "digit": "1"}
    yield json.dumps({"event": "dtmf", "streamSid": "MZ1", "sequenceNumber": str(number + 2), "dtmf": dtmf})
    stop = {"accountSid": "AC1", "callSid": call}
    yield json.dumps({"event": "stop", "sequenceNumber": str(number + 3), "stop": stop, "streamSid": "MZ1"})


def twilio_media(number: int, track: str, place: int, data: bytes) -> str:
    media = {
        "track": track,
        "chunk": str(place // CHUNK + 1),
        "timestamp": str(place // 8),
        "payload": base64.b64encode(data).decode(),
    }
    return json.dumps({"event": "media", "sequenceNumber": str(number), "media": media, "streamSid": "MZ1"})


def telnyx(tracks: Mapping[str, bytes], encoding: str = "PCMU") -> Iterator[str]:
    yield json.dumps({"event": "connected", "version": "1.0.0"})
    form = {"encoding": encoding, "sample_rate": 8000, "channels": 1}
    start = {"user_id": "u", "call_control_id": "v2:1", "client_state": "", "media_format": form}
    yield json.dumps({"event": "start", "sequence_number": "1", "start": start, "stream_id": "S1"})
    number = 1
    for place in range(0, max(map(len, tracks.values())), CHUNK):
        for track, data in tracks.items():
            number += 1
            payload = base64.b64encode(data[place : place + CHUNK]).decode()
            chunk, time = str(place // CHUNK + 1), str(place // 8 + 5)
            media = {"track": track, "chunk": chunk, "timestamp": time, "payload": payload}
            yield json.dumps({"event": "media", "sequence_number": str(number), "media": media, "stream_id": "S1"})
    stop = {"user_id": "u", "call_control_id": "v2:1"}
    yield json.dumps({"event": "stop", "sequence_number": str(number + 1), "stop": stop, "stream_id": "S1"})


def plivo(tracks: Mapping[str, bytes], extra: str = "") -> Iterator[str]:
    form = {"encoding": "audio/x-mulaw", "sampleRate": 8000}
    start = {"callId": "call-1", "streamId": "S1", "accountId": "MA1", "tracks": list(tracks), "mediaFormat": form}
    yield json.dumps({"event": "start", "sequenceNumber": 1, "start": start, "extra_headers": extra})
    number = 1
    for place in range(0, max(map(len, tracks.values())), CHUNK):
        for track, data in tracks.items():
            number += 1
            payload = base64.b64encode(data[place : place + CHUNK]).decode()
            time = str(1_705_312_200_000 + place // 8)
            media = {"track": track, "timestamp": time, "chunk": place // CHUNK + 1, "payload": payload}
            yield json.dumps({"event": "media", "sequenceNumber": number, "streamId": "S1", "media": media})


def vonage(data: bytes, rate: int = 16_000, headers: Mapping[str, str] | None = None) -> Iterator[str | bytes]:
    begin = {"event": "websocket:connected", "content-type": f"audio/l16;rate={rate}", **(headers or {})}
    yield json.dumps(begin)
    size = rate // 50 * 2
    yield from (data[place : place + size] for place in range(0, len(data), size))
    yield json.dumps({"event": "websocket:dtmf", "digit": "5", "duration": 260})
