"""The messages of telephony providers' media streams: what they announce, and the samples of both directions.

| provider | its product | audio |
|---|---|---|
| `twilio` | Media Streams | JSON with base64, µ-law at 8 kHz |
| `telnyx` | Media Streaming | JSON with base64, µ-law or A-law (PCMU, PCMA) at 8 kHz |
| `plivo` | Audio Streaming | JSON with base64, µ-law at 8 kHz |
| `vonage` | WebSockets of the Voice API | binary messages, 16-bit PCM at 8 or 16 kHz |
"""

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mal_adapter.errors import ConfigError, StreamError
from mal_adapter.ser.live.codecs import Decoder, Samples
from mal_adapter.ser.live.tracks import Tracks
from mal_adapter.serialization.text import shown

__all__ = ["PROVIDERS", "MediaStream", "StreamStart"]


@dataclass(frozen=True)
class StreamStart:
    """What a provider says at the start of a stream.

    Args:
        call_id: The provider's id of the call.
        encoding: "mulaw", "alaw" or "pcm16".
        sampling_rate: In Hz.
        tracks: The directions that are sent, one per channel of the samples: "inbound" is what the provider receives
            from the other side of the call, "outbound" what it sends to it.
        parameters: What you gave the provider for this stream: Twilio's `<Parameter>`, Plivo's `extraHeaders`, Vonage's
            `headers`, Telnyx's custom parameters.
    """

    call_id: str
    encoding: str
    sampling_rate: int
    tracks: tuple[str, ...]
    parameters: Mapping[str, str]


class MediaStream:
    """Reads the messages of one connection, in the order in which they arrive.

    Lost chunks become silence, repeated ones are dropped, and chunks that come too early wait for those before them, so
    that all times are those of the call. The two directions are the channels of the samples, side by side.

    Args:
        provider: One of `PROVIDERS`.
        tracks: The tracks that Telnyx was asked for, which it does not announce.

    Attributes:
        start: What the provider announced; None before.
        ended: Whether the provider has said that the stream has ended.

    Raises:
        ConfigError: The provider is not known.

    Example:
        >>> stream = MediaStream("twilio")
        >>> format = {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1}
        >>> start = {"callSid": "CA1", "tracks": ["inbound"], "mediaFormat": format}
        >>> stream.feed(json.dumps({"event": "start", "streamSid": "MZ1", "start": start}))
        >>> stream.start.call_id, stream.start.tracks
        ('CA1', ('inbound',))
        >>> media = {"track": "inbound", "chunk": "1", "timestamp": "5", "payload": "/////w=="}
        >>> stream.feed(json.dumps({"event": "media", "streamSid": "MZ1", "media": media})).shape
        (4, 1)
    """

    def __init__(self, provider: str, tracks: Sequence[str] = ("inbound",)) -> None:
        if provider not in PROVIDERS:
            raise ConfigError(f"the provider {provider!r} is not known; choose one of {', '.join(PROVIDERS)}")
        self._provider = provider
        self._asked_for = _both(tracks)
        self.start: StreamStart | None = None
        self.ended = False
        self._decoders: dict[str, Decoder] = {}
        self._tracks: Tracks | None = None

    def feed(self, message: str | bytes) -> Samples | None:
        """Read one message.

        Args:
            message: Text or binary, as it came.

        Returns:
            (frames, tracks) that are now known of all tracks; None if the message has no audio.

        Raises:
            StreamError: The message is not one of this provider's, or comes before the start.
        """
        if isinstance(message, bytes):
            if self._provider != "vonage":
                raise StreamError(f"{self._provider} sends text messages, got a binary one of {len(message)} bytes")
            (track,) = self._started().tracks
            return self._decoders[track](message)
        fields = _object(message)
        event = fields.get("event")
        if event == PROVIDERS[self._provider].begins:
            self._begin(fields)
        elif event == "media":
            return self._media(fields)
        elif event == "stop":
            self.ended = True
        elif event == "error":
            raise StreamError(f"{self._provider} reports an error: {shown(fields.get('payload', fields))}")
        return None  # marks, digits and other events have no audio

    def finish(self) -> Samples | None:
        """The frames that still wait for another track, or for a chunk that has not come."""
        return None if self._tracks is None else self._tracks.finish()

    def _begin(self, fields: Mapping[str, Any]) -> None:
        if self.start is not None:
            raise StreamError("the stream has started already; each stream needs a connection of its own")
        start = PROVIDERS[self._provider].read_start(fields)
        self.start = start if start.tracks else replace(start, tracks=self._asked_for)
        self._decoders = {track: Decoder(self.start.encoding) for track in self.start.tracks}
        self._tracks = Tracks(self.start.tracks, self.start.sampling_rate)

    def _media(self, fields: Mapping[str, Any]) -> Samples:
        start, media = self._started(), fields.get("media")
        assert self._tracks is not None
        if not isinstance(media, Mapping) or not isinstance(media.get("payload"), str):
            raise StreamError(f"a message of media needs media.payload, a string, got the keys {shown(sorted(fields))}")
        track = media.get("track", start.tracks[0])
        if track not in self._decoders:
            raise StreamError(f"the start announces the tracks {', '.join(start.tracks)}, got media of {shown(track)}")
        try:
            data = base64.b64decode(media["payload"], validate=True)
        except binascii.Error as error:
            raise StreamError(f"media.payload is not base64 ({error})") from None
        chunk, time_ms = _number(media, "chunk"), _number(media, "timestamp")
        return self._tracks.add(track, self._decoders[track](data)[:, 0], chunk, time_ms)

    def _started(self) -> StreamStart:
        if self.start is None:
            raise StreamError("audio came before the message that announces its format")
        return self.start


@dataclass(frozen=True)
class _Provider:
    begins: str
    """The event that announces the format."""
    read_start: Callable[[Mapping[str, Any]], StreamStart]


def _read_twilio(fields: Mapping[str, Any]) -> StreamStart:
    start = _part(fields, "start")
    return StreamStart(
        _text(start, "callSid"),
        *_format(_part(start, "mediaFormat"), "sampleRate", {"audio/x-mulaw": "mulaw"}),
        _both(start.get("tracks")),
        _parameters(start.get("customParameters")),
    )


def _read_telnyx(fields: Mapping[str, Any]) -> StreamStart:
    start = _part(fields, "start")
    return StreamStart(
        _text(start, "call_control_id"),
        *_format(_part(start, "media_format"), "sample_rate", {"PCMU": "mulaw", "PCMA": "alaw"}),
        (),  # which of them were asked for is not in the message
        _parameters(start.get("custom_parameters")),
    )


def _read_plivo(fields: Mapping[str, Any]) -> StreamStart:
    start = _part(fields, "start")
    extra = fields.get("extra_headers")
    pairs = re.findall(r"([^=;,]+)=([^;,]*)", extra) if isinstance(extra, str) else []
    return StreamStart(
        _text(start, "callId"),
        *_format(_part(start, "mediaFormat"), "sampleRate", {"audio/x-mulaw": "mulaw"}),
        _both(start.get("tracks")),
        {name.strip(): value.strip() for name, value in pairs},
    )


def _read_vonage(fields: Mapping[str, Any]) -> StreamStart:
    kind = re.fullmatch(r"audio/l16;\s*rate=(8000|16000)", str(fields.get("content-type")), re.IGNORECASE)
    if kind is None:
        given = shown(fields.get("content-type"))
        raise StreamError(f"expected the content-type audio/l16;rate=8000 or audio/l16;rate=16000, got {given}")
    # The rest is what was given as `headers` of the endpoint. Vonage itself sends no id of the call.
    parameters = _parameters({name: value for name, value in fields.items() if name not in ("event", "content-type")})
    return StreamStart(parameters.get("uuid", ""), "pcm16", int(kind[1]), ("inbound",), parameters)


#: Name -> how its stream begins.
PROVIDERS: Mapping[str, _Provider] = {
    "twilio": _Provider("start", _read_twilio),
    "telnyx": _Provider("start", _read_telnyx),
    "plivo": _Provider("start", _read_plivo),
    "vonage": _Provider("websocket:connected", _read_vonage),
}


def _object(message: str) -> Mapping[str, Any]:
    try:
        fields = json.loads(message)
    except (ValueError, RecursionError) as error:
        raise StreamError(f"a text message must be JSON ({error})") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("event"), str):
        raise StreamError("a text message must be a JSON object with a string 'event'")
    return fields


def _part(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = fields.get(name)
    if not isinstance(part, Mapping):
        raise StreamError(f"expected an object {name!r}, got the keys {shown(sorted(fields))}")
    return part


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise StreamError(f"expected a string {name!r}, got the keys {shown(sorted(fields))}")
    return value


def _format(fields: Mapping[str, Any], rate: str, encodings: Mapping[str, str]) -> tuple[str, int]:
    """(The encoding, the rate in Hz)."""
    given, given_rate = fields.get("encoding"), fields.get(rate)
    if not isinstance(given, str) or given not in encodings or given_rate != 8000:
        raise StreamError(
            f"expected {' or '.join(encodings)} at 8000 Hz, got {shown(dict(fields))}; choose this codec for the stream"
        )
    return encodings[given], given_rate


def _both(tracks: object) -> tuple[str, ...]:
    """The announced tracks, inbound first."""
    names = ("inbound", "outbound")
    given = tracks if isinstance(tracks, Sequence) else ()
    found = tuple(name for name in names if name in given)
    if not found:
        raise StreamError(f"expected the tracks inbound, outbound or both, got {shown(tracks)}")
    return found


def _parameters(given: object) -> dict[str, str]:
    return {str(name): str(value) for name, value in given.items()} if isinstance(given, Mapping) else {}


def _number(fields: Mapping[str, Any], name: str) -> int | None:
    """Providers send numbers as numbers or as strings."""
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,15}", str(value)):
        raise StreamError(f"media.{name} must be a number, got {shown(value)}")
    return int(value)
