"""The WebSockets: live streams of sound, media streams of telephony providers, and whoever watches a session."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

from fastapi import APIRouter, WebSocket
from fastapi.concurrency import run_in_threadpool
from starlette.responses import JSONResponse
from starlette.websockets import WebSocketDisconnect, WebSocketState

from mal_adapter.errors import ConfigError, MalAdapterError, StreamError
from mal_adapter.extras import missing_dependency
from mal_adapter.ser.live.codecs import ENCODINGS, Decoder, Samples
from mal_adapter.ser.live.media_streams import PROVIDERS, MediaStream
from mal_adapter.ser.live.stream import live_settings, speakers_of
from mal_adapter.ser.live.turn_stream import TurnStream
from mal_adapter.server.refusals import Refusal, refusal_of
from mal_adapter.server.requests import note
from mal_adapter.server.service import Service
from mal_adapter.server.spaces import Space
from mal_adapter.server.stream_keys import FIRST_S, SUBPROTOCOL, space_before, space_by_message
from mal_adapter.server.stream_run import Source, StreamRun
from mal_adapter.server.turns import in_time

__all__ = ["stream_routes"]

_RATES = (8_000, 48_000)
_CHANNELS = 8
#: HTTP status of a refusal -> code of a WebSocket that is accepted already.
_CODES = {400: 1008, 401: 1008, 403: 1008, 409: 1008, 422: 1008, 503: 1013}


@dataclass(frozen=True)
class _Format:
    encoding: str
    sampling_rate: int
    speakers: tuple[str, ...]


def stream_routes(service: Service) -> APIRouter:
    """`WS /sessions/ID/stream`, `WS /media-streams/PROVIDER` and `WS /sessions/ID/watch`."""
    router, limits, streams = APIRouter(), service.limits, service.streams

    @router.websocket("/sessions/{session_id:text}/stream")
    async def stream(session_id: str, socket: WebSocket) -> None:
        """Binary messages are sound; the text message `{"type": "finish"}` ends it."""

        async def answer() -> None:
            _check_installed()
            given = _format(socket.query_params)
            async with _authorized(service, socket, lambda space: streams.check(space.stored(session_id))) as space:
                source = _Sound(given)
                await run(socket, source, session_id, space.stored(session_id), given, answers=True)

        await _refusing(socket, answer)

    @router.websocket("/media-streams/{provider}")
    async def media_stream(provider: str, socket: WebSocket) -> None:
        """The messages are those of the provider, whose start may name the session, the channels and the API key."""

        async def answer() -> None:
            _check_installed()
            if provider not in PROVIDERS:
                raise Refusal(404, "not_found", f"{provider!r} is no provider known here: {', '.join(PROVIDERS)}")
            names = _names(socket.query_params.get("channels"))
            answers = socket.query_params.get("answers", "true") != "false"
            source = MediaStream(provider, ("inbound", "outbound")[: max(1, min(2, len(names)))])
            with streams.counted():
                space = space_before(service, socket)
                await _accept(socket)
                parameters = await _begin(socket, source)
                assert source.start is not None
                if space is None:
                    space = service.space(socket, f"Bearer {parameters.get('api_key', '')}")
                names = names or _names(parameters.get("channels")) or source.start.tracks
                if len(names) != len(source.start.tracks):
                    raise _invalid(
                        f"the stream has the tracks {', '.join(source.start.tracks)}, got {len(names)} names"
                    )
                session_id = socket.query_params.get("session") or parameters.get("session") or source.start.call_id
                stored_id = space.stored(session_id)
                start = source.start
                given = _Format(start.encoding, start.sampling_rate, _speakers(names))
                await run(socket, source, session_id, stored_id, given, answers=answers)

        await _refusing(socket, answer)

    @router.websocket("/sessions/{session_id:text}/watch")
    async def watch(session_id: str, socket: WebSocket) -> None:
        """The messages of the session's live streams, from now on."""

        async def answer() -> None:
            async with _authorized(service, socket, lambda space: space.stored(session_id)) as space:
                stored_id = space.stored(session_id)
                note(socket.scope, session=session_id)
                with streams.watchers.watching(stored_id) as queue:
                    gone = asyncio.create_task(_until_gone(socket))
                    try:
                        await _send_ready(socket, session_id)
                        await _hand_on(socket, queue, gone)
                    finally:
                        gone.cancel()

        await _refusing(socket, answer)

    async def run(
        socket: WebSocket, source: Source, session_id: str, stored_id: str, given: _Format, *, answers: bool
    ) -> None:
        note(socket.scope, session=session_id)
        async with AsyncExitStack() as held:
            held.enter_context(streams.session(stored_id))
            with in_time(limits.timeout_s):
                await held.enter_async_context(service.turns.locked(stored_id))
            recognizer = service.recognizer
            longest_s = await run_in_threadpool(lambda: recognizer.longest_s)
            settings = live_settings(None, min(longest_s, limits.max_audio_s))
            found = await run_in_threadpool(  # the first one reads the network
                TurnStream, given.sampling_rate, recognizer.sampling_rate, given.speakers, settings
            )
            if answers:
                await _send_ready(socket, session_id, given)
            await StreamRun(
                service, socket, source, found, session_id, stored_id, given.sampling_rate, given.speakers, settings,
                answers,
            ).run()  # fmt: skip

    return router


class _Sound:
    """Binary messages of a stream whose format is in the URL."""

    def __init__(self, given: _Format) -> None:
        self._decode = Decoder(given.encoding, len(given.speakers))
        self.ended = False

    def feed(self, message: str | bytes) -> Samples | None:
        """The samples of a message; None at the end."""
        if isinstance(message, bytes):
            return self._decode(message)
        try:
            kind = json.loads(message)["type"]
        except (ValueError, TypeError, KeyError, RecursionError):
            kind = None
        if kind == "authorize":
            return None  # a client that always sends its key, to a server that needs none or has it already
        if kind != "finish":
            raise StreamError('send sound as binary messages, and {"type": "finish"} at its end')
        self.ended = True
        return None

    def finish(self) -> Samples | None:
        """Nothing is left but a part of a frame."""
        return None


@asynccontextmanager
async def _authorized(service: Service, socket: WebSocket, check: Callable[[Space], object]) -> AsyncIterator[Space]:
    """Accept a WebSocket, whose key may be in its first message. `check` may refuse it before, if its key is known."""
    with service.streams.counted():
        space = space_before(service, socket)
        if space is not None:
            check(space)
        await _accept(socket)
        yield await space_by_message(service, socket) if space is None else space


async def _accept(socket: WebSocket) -> None:
    offered = socket.scope.get("subprotocols", ())
    await socket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)  # never the one with the key


async def _refusing(socket: WebSocket, answer: Callable[[], Awaitable[None]]) -> None:
    """Run a route. A refusal is an HTTP answer before the WebSocket is accepted, afterwards a message and a code."""
    try:
        await answer()
    except WebSocketDisconnect:
        note(socket.scope, reason="disconnected")
    except (Refusal, MalAdapterError) as error:
        refusal = _invalid(str(error)) if isinstance(error, (ConfigError, StreamError)) else refusal_of(error)
        note(socket.scope, reason=refusal.kind)
        if socket.application_state == WebSocketState.CONNECTING:
            if "websocket.http.response" not in socket.scope.get("extensions", {}):
                return await socket.close(1008, refusal.kind)  # an ASGI server that can only say 403
            body = {"type": refusal.kind, "detail": refusal.detail}
            await socket.send_denial_response(JSONResponse(body, refusal.status_code, refusal.headers))
            return
        message = {"type": "error", "error": {"type": refusal.kind, "detail": refusal.detail}}
        with suppress(WebSocketDisconnect, RuntimeError):
            await socket.send_text(json.dumps(message))
            await socket.close(_CODES.get(refusal.status_code, 1011), refusal.kind)


async def _begin(socket: WebSocket, source: MediaStream) -> Mapping[str, str]:
    """Read a provider's messages up to the start of its stream. Returns the parameters."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + FIRST_S
    while source.start is None:
        try:
            message = await asyncio.wait_for(socket.receive(), max(0.0, deadline_s - loop.time()))
        except asyncio.TimeoutError:
            raise _invalid(f"the stream has not been announced within {FIRST_S:g} s") from None
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1006))
        data = message.get("bytes")
        source.feed(message.get("text") or "" if data is None else data)
    return source.start.parameters


async def _send_ready(socket: WebSocket, session_id: str, given: _Format | None = None) -> None:
    fields = {} if given is None else {
        "encoding": given.encoding, "sampling_rate": given.sampling_rate, "channels": list(given.speakers)
    }  # fmt: skip
    await socket.send_text(json.dumps({"type": "ready", "session": session_id, **fields}))


async def _hand_on(socket: WebSocket, queue: "asyncio.Queue[str | None]", gone: "asyncio.Task[None]") -> None:
    """Send a watcher its messages, until it is gone or is cut off."""
    while True:
        message = asyncio.ensure_future(queue.get())
        await asyncio.wait([message, gone], return_when=asyncio.FIRST_COMPLETED)
        if not message.done():
            message.cancel()
            return
        if (text := message.result()) is None:
            with suppress(WebSocketDisconnect, RuntimeError):
                await socket.close(1012, "draining, or too slow")
            return
        await socket.send_text(text)


async def _until_gone(socket: WebSocket) -> None:
    while (await socket.receive())["type"] != "websocket.disconnect":
        pass


def _check_installed() -> None:
    if (error := missing_dependency("a live stream", "silero_vad", extra="recordings")) is not None:
        raise Refusal(501, "not_installed", str(error))


def _format(query: Mapping[str, str]) -> _Format:
    encoding, rate = query.get("encoding", "pcm16"), query.get("sampling_rate", "16000")
    if encoding not in ENCODINGS:
        raise _invalid(f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r}")
    if not rate.isdecimal() or not _RATES[0] <= int(rate[:9]) <= _RATES[1]:
        raise _invalid(f"sampling_rate must be from {_RATES[0]} to {_RATES[1]}, got {rate!r}")
    return _Format(encoding, int(rate), _speakers(_names(query.get("channels")) or 1))


def _names(channels: str | None) -> tuple[str, ...]:
    """The names of the channels in a URL: `channels=customer,agent`, or their number; none if there is nothing."""
    if not channels:
        return ()
    if channels.isdecimal() and 1 <= int(channels[:9]) <= _CHANNELS:
        return speakers_of(int(channels))
    return tuple(name.strip() for name in channels.split(","))


def _speakers(channels: int | Sequence[str]) -> tuple[str, ...]:
    speakers = speakers_of(channels)
    if len(speakers) > _CHANNELS or any(name.isdecimal() for name in speakers):
        raise _invalid(f"channels must be a number up to {_CHANNELS}, or as many names, got {', '.join(speakers)}")
    return speakers


def _invalid(detail: str) -> Refusal:
    return Refusal(422, "invalid_request", detail)
