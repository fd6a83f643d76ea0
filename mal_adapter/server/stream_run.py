"""`StreamRun`: one live stream, from its first message to its last answer."""

import asyncio
import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from starlette.websockets import WebSocket, WebSocketDisconnect

from mal_adapter.errors import SessionConflictError, StreamError
from mal_adapter.ser.live.arrivals import Arrivals
from mal_adapter.ser.live.codecs import Samples
from mal_adapter.ser.live.turn_stream import TurnStream
from mal_adapter.ser.turns.turn import TurnSettings
from mal_adapter.server.answers import Answer, Turn
from mal_adapter.server.refusals import Refusal, refusal_of
from mal_adapter.server.requests import note
from mal_adapter.server.service import Service
from mal_adapter.server.stream_worker import WAITING_S, SpeechStarted, StreamInput, TurnFound
from mal_adapter.server.turns import timed_out

__all__ = ["CLOSE_CODES", "Source", "StreamRun"]

log = logging.getLogger(__name__)

#: Why a stream ends -> the code with which the WebSocket is closed.
CLOSE_CODES = {
    "finished": 1000,
    "disconnected": 1000,
    "bad_message": 1007,
    "idle": 1008,
    "too_long": 1008,
    "too_large": 1009,
    "internal_error": 1011,
    "draining": 1012,
}


class Source(Protocol):
    """Reads the messages of a stream."""

    ended: bool
    """Whether the client has said that there is no more."""

    def feed(self, message: str | bytes) -> Samples | None:
        """The samples of a message."""

    def finish(self) -> Samples | None:
        """The samples that are left."""


class StreamRun:
    """Reads the messages of a stream, finds its turns, and sends each answer.

    Reader, worker and answers are connected by what may wait between them, which is bounded: a client that is faster
    than the server is not read until the server has caught up.

    Args:
        service: Of the server.
        socket: Accepted.
        source: Reads the messages.
        stream: Finds the turns.
        session_id: The session's id for the client.
        stored_id: The session's id in the store. The caller has locked it.
        sampling_rate: Of the samples, in Hz.
        speakers: The name of each channel's speaker.
        settings: Of the stream.
        answers: Whether the client gets messages; watchers always do.

    Attributes:
        last_message_s: When the last message came, by the clock of the event loop.
    """

    def __init__(
        self,
        service: Service,
        socket: WebSocket,
        source: Source,
        stream: TurnStream,
        session_id: str,
        stored_id: str,
        sampling_rate: int,
        speakers: tuple[str, ...],
        settings: TurnSettings,
        answers: bool,
    ) -> None:
        assert settings.max_s is not None
        self._service = service
        self._socket = socket
        self._source = source
        self._session_id = session_id
        self._stored_id = stored_id
        self._rate = sampling_rate
        self._speakers = speakers
        self._answers = answers
        self._loop = asyncio.get_running_loop()
        self._arrivals = Arrivals(settings.max_s + settings.merge_s + 2 * WAITING_S)
        self._input = StreamInput(stream, sampling_rate, len(speakers), settings.min_s, self._arrivals)
        self._frames = self._turns = self._errors = 0
        self._reason: str | None = None
        self._reader: asyncio.Task[None] | None = None
        self.last_message_s = self._loop.time()

    def stop(self, reason: str) -> None:
        """Read no more messages, answer what was said, and end."""
        if self._reason is None and self._reader is not None:
            self._reason = reason
            self._reader.cancel()

    async def run(self) -> None:
        """Until the end of the stream. The socket is closed afterwards."""
        worker = self._service.streams.worker
        worker.begin(self._input)
        self._reader = asyncio.create_task(self._read())
        try:
            with self._service.streams.running(self):
                while (event := await self._input.events.get()) is not None:
                    await self._handle(event)
        except Exception:
            log.exception("a live stream fails")
            self._reason = "internal_error"
        finally:
            self._reader.cancel()
            worker.drop(self._input)
        reason = self._reason or "finished"
        audio_s = round(self._frames / self._rate, 3)
        self._service.metrics.stream_audio.inc(audio_s)
        await self._send({"type": "end", "reason": reason, "turns": self._turns, "audio_s": audio_s})
        with suppress(WebSocketDisconnect, RuntimeError):
            await self._socket.close(CLOSE_CODES[reason], reason)
        note(self._socket.scope, audio_s=audio_s, turns=self._turns, errors=self._errors, reason=reason)

    async def _read(self) -> None:
        """Read messages until one of the ends; then let the worker know that there are no more."""
        try:
            try:
                await self._read_messages()
            except asyncio.CancelledError:
                if self._reason is None:
                    raise
            except StreamError as error:
                self._reason = self._reason or "bad_message"
                await self._send({"type": "error", "error": {"type": self._reason, "detail": str(error)}})
            if (rest := self._source.finish()) is not None:
                await self._feed(rest)
        except Exception:
            log.exception("a live stream can't be read")
            self._reason = "internal_error"
        finally:
            self._service.streams.worker.end(self._input)

    async def _read_messages(self) -> None:
        while not self._source.ended and self._reason is None:
            message = await self._socket.receive()
            self.last_message_s = self._loop.time()
            if message["type"] == "websocket.disconnect":
                self._reason = "disconnected"
            elif (data := message.get("bytes")) is None:
                await self._take(message.get("text") or "")
            else:
                await self._take(data)

    async def _take(self, message: str | bytes) -> None:
        if len(message) > self._service.limits.max_message_bytes:
            self._reason = "too_large"
            raise StreamError(f"the message has more than {self._service.limits.max_message_bytes} bytes; send less")
        if (samples := self._source.feed(message)) is not None:
            await self._feed(samples)

    async def _feed(self, samples: Samples) -> None:
        if not len(samples):
            return
        self._frames += len(samples)
        self._arrivals.add(self._frames / self._rate, self._loop.time())
        await self._service.streams.worker.feed(self._input, samples)
        self.last_message_s = self._loop.time()  # the client has not been idle while it was not read
        if self._frames > self._service.limits.max_stream_s * self._rate:
            self._reason = "too_long"

    async def _handle(self, event: SpeechStarted | TurnFound | Exception) -> None:
        if isinstance(event, Exception):
            raise event
        if isinstance(event, SpeechStarted):
            speaker, channel = self._speakers[event.channel], self._channel(event.channel)
            await self._send(
                {"type": "speech_started", "speaker": speaker, "channel": channel, "start_s": event.start_s}
            )
            return
        try:
            await self._send(await self._message(event))
        finally:
            self._service.streams.worker.answered(self._input)

    async def _message(self, found: TurnFound) -> dict[str, Any]:
        """The answer to a turn, or why there is none."""
        turn = found.spoken.turn
        where = {
            "speaker": turn.speaker,
            "channel": turn.channel,
            "start_s": round(turn.start_s, 3),
            "end_s": round(turn.end_s, 3),
        }
        try:
            answer = await self._answer(Turn(self._stored_id, Path("stream"), found.spoken.waveform))
        except Exception as error:
            refusal = refusal_of(error)
            if not isinstance(error, Refusal):
                log.warning("%s: %s", type(error).__name__, error, exc_info=refusal.kind == "internal_error")
            self._errors += 1
            self._service.metrics.stream_errors.inc()
            return {"type": "error", "error": {"type": refusal.kind, "detail": refusal.detail}, **where}
        delay_s = self._loop.time() - found.voice_came_s
        self._turns += 1
        self._service.metrics.stream_delay.observe(delay_s)
        return {
            "type": "turn",
            "session": self._session_id,
            "utterance": answer.utterance,
            **where,
            "overlaps": turn.overlaps,
            "emotion": answer.prediction.label,
            "probabilities": answer.prediction.probabilities,
            "audio_s": answer.prediction.audio_s,
            "delay_s": round(delay_s, 4),
            "elapsed_s": answer.elapsed_s,
            "saved": answer.saved,
        }

    async def _answer(self, turn: Turn) -> Answer:
        """The answer to a turn. It can't be sent again, so after a conflict it continues from the other's state."""

        async def wanted() -> bool:
            return True

        timeout_s = self._service.limits.timeout_s
        try:
            try:
                return await self._service.batcher.submit(turn, timeout_s, wanted)
            except SessionConflictError:
                self._service.metrics.conflicts.inc()
                return await self._service.batcher.submit(turn, timeout_s, wanted)
        except TimeoutError:
            raise timed_out(timeout_s) from None

    def _channel(self, number: int) -> int | None:
        return None if self._speakers == ("?",) else number

    async def _send(self, message: dict[str, Any]) -> None:
        text = json.dumps(message)
        self._service.streams.watchers.publish(self._stored_id, text)
        if not self._answers:
            return
        try:
            await asyncio.wait_for(self._socket.send_text(text), self._service.limits.timeout_s)
        except (WebSocketDisconnect, RuntimeError, asyncio.TimeoutError):
            # The client is gone, or reads nothing. What was said is still answered and written.
            self._answers = False
            self.stop("disconnected")
