"""`Streams`: the live streams of one server, and what ends them from outside."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from mal_adapter.server.drain import Drain
from mal_adapter.server.limits import Limits
from mal_adapter.server.refusals import AGAIN, Refusal
from mal_adapter.server.stream_worker import StreamWorker
from mal_adapter.server.watching import Watchers

__all__ = ["Stoppable", "Streams"]

_LOOK_S = 0.05


class Stoppable(Protocol):
    """A live stream."""

    last_message_s: float
    """When its last message came, by the clock of the event loop."""

    def stop(self, reason: str) -> None:
        """Read no more messages, answer what was said, and end."""


class Streams:
    """Counts live streams, keeps their sessions apart, and ends those that are idle, and all of them in a drain.

    Args:
        limits: `max_streams` and `idle_s` are used.
        drain: Of the server.

    Attributes:
        worker: Finds the streams' turns.
        watchers: Get the streams' messages.
    """

    def __init__(self, limits: Limits, drain: Drain) -> None:
        self._limits = limits
        self._drain = drain
        self._count = 0
        self._sessions: set[str] = set()
        self._running: set[Stoppable] = set()
        self.worker = StreamWorker()
        self.watchers = Watchers()
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """How many connections of streams there are."""
        return self._count

    def start(self) -> None:
        """Begin to work."""
        self.worker.start()
        self._task = asyncio.create_task(self._look())

    async def stop(self) -> None:
        """End."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.worker.stop()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Within this block there is one more connection.

        Raises:
            Refusal: 503, there are too many.
        """
        if self._count >= self._limits.max_streams:
            raise Refusal(503, "busy", f"{self._count} live streams are running; try again later", AGAIN)
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1

    def check(self, stored_id: str) -> None:
        """Check that no live stream has a session.

        Raises:
            Refusal: 409, one has it.
        """
        if stored_id in self._sessions:
            raise Refusal(409, "session_busy", "another live stream has this session; end it, or choose another id")

    @contextmanager
    def session(self, stored_id: str) -> Iterator[None]:
        """Within this block the session is that of one live stream.

        Raises:
            Refusal: 409, another live stream has it.
        """
        self.check(stored_id)
        self._sessions.add(stored_id)
        try:
            yield
        finally:
            self._sessions.discard(stored_id)

    @contextmanager
    def running(self, stream: Stoppable) -> Iterator[None]:
        """Within this block the stream is ended if it is idle, or with the server."""
        self._running.add(stream)
        try:
            yield
        finally:
            self._running.discard(stream)

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_LOOK_S)
            if self._drain.began:
                self.watchers.close()
            for stream in list(self._running):
                if self._drain.began:
                    stream.stop("draining")
                elif loop.time() - stream.last_message_s > self._limits.idle_s:
                    stream.stop("idle")
