"""`StreamWorker`: finds the turns of all live streams in one thread, with one pass of the network for all of them."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from mal_adapter.ser.live.arrivals import Arrivals
from mal_adapter.ser.live.codecs import Samples
from mal_adapter.ser.live.turn_stream import SpokenTurn, TurnStream, feed_streams

__all__ = ["WAITING_S", "SpeechStarted", "StreamInput", "StreamWorker", "TurnFound"]

#: Blocks of all streams are collected for so many seconds; each of them has one every 20 ms or so.
GATHER_S = 0.016
#: Seconds of sound of a stream that may wait for the worker. Then its messages are not read.
WAITING_S = 1.0
#: Turns of a stream that may wait for their answers. Then its sound waits.
WAITING_TURNS = 4


class SpeechStarted(NamedTuple):
    """Somebody speaks, for long enough that it may become a turn."""

    channel: int
    start_s: float


class TurnFound(NamedTuple):
    """A turn has ended, and its voice had come at a time of the caller's clock."""

    spoken: SpokenTurn
    voice_came_s: float


class StreamInput:
    """The way of one stream's sound to the worker, and of its turns back.

    Args:
        stream: Of this input alone.
        sampling_rate: Of the blocks, in Hz.
        channels: Of the blocks.
        shortest_s: Speech is reported when it is as long as this.
        arrivals: When the sound came.

    Attributes:
        events: What the worker finds, in order: starts and turns; an exception if it fails; None after the last one.
    """

    def __init__(
        self, stream: TurnStream, sampling_rate: int, channels: int, shortest_s: float, arrivals: Arrivals
    ) -> None:
        self.events: asyncio.Queue[SpeechStarted | TurnFound | Exception | None] = asyncio.Queue()
        self._arrivals = arrivals
        self._stream = stream
        self._most = round(WAITING_S * sampling_rate)
        self._shortest_s = shortest_s
        self._empty = np.zeros((0, channels), dtype=np.float32)
        self._blocks: list[Samples] = []
        self._frames = 0
        self._space = asyncio.Event()
        self._space.set()
        self._unanswered = 0
        self._speaking: list[bool] = [False] * channels
        self.ending = False
        self.over = False

    @property
    def ready(self) -> bool:
        """Whether there is something for the worker to do."""
        return (bool(self._blocks) or self.ending) and self._unanswered < WAITING_TURNS

    async def add(self, block: Samples) -> None:
        """Add a block, and wait until there is space for another one."""
        self._blocks.append(block)
        self._frames += len(block)
        if self._frames >= self._most:
            self._space.clear()
            await self._space.wait()

    def answered(self) -> None:
        """One of the turns has its answer."""
        self._unanswered -= 1

    def take(self) -> "_Job":
        """What is there now."""
        blocks, self._blocks, self._frames = self._blocks, [], 0
        self._space.set()
        return _Job(self._stream, np.concatenate(blocks) if blocks else self._empty, self.ending)

    def give(self, found: "_Found | Exception", last: bool) -> None:
        """Take over what the worker has found."""
        if isinstance(found, Exception):
            self.events.put_nowait(found)
            self.over = True
            return
        for channel, since_s in enumerate(found.speaking):
            # Speech that is split continues, and has been reported.
            long_enough = since_s is not None and found.position_s - since_s >= self._shortest_s
            if since_s is not None and long_enough and not self._speaking[channel]:
                self.events.put_nowait(SpeechStarted(channel, since_s))
            self._speaking[channel] = since_s is not None and (long_enough or self._speaking[channel])
        for turn in found.turns:
            self._unanswered += 1
            self.events.put_nowait(TurnFound(turn, self._arrivals.of(turn.voice_end_s)))
        if last:
            self.events.put_nowait(None)
            self.over = True


class _Job(NamedTuple):
    stream: TurnStream
    block: Samples
    last: bool


class _Found(NamedTuple):
    turns: list[SpokenTurn]
    speaking: list[float | None]
    position_s: float


class StreamWorker:
    """One thread for all streams of a server. All methods belong to one event loop."""

    def __init__(self) -> None:
        self._inputs: set[StreamInput] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to work."""
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mal_adapter_streams")
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """End; streams that are not over never get their rest."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._thread.shutdown(wait=False, cancel_futures=True)

    def begin(self, stream: StreamInput) -> None:
        """Work for a stream from now on."""
        self._inputs.add(stream)

    async def feed(self, stream: StreamInput, block: Samples) -> None:
        """Continue a stream. Returns when there is space for another block."""
        self._arrived.set()
        await stream.add(block)

    def end(self, stream: StreamInput) -> None:
        """The stream has no more blocks; its last event will be None."""
        stream.ending = True
        self._arrived.set()

    def answered(self, stream: StreamInput) -> None:
        """One of the stream's turns has its answer."""
        stream.answered()
        self._arrived.set()

    def drop(self, stream: StreamInput) -> None:
        """Work no more for a stream."""
        self._inputs.discard(stream)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            await asyncio.sleep(GATHER_S)
            self._arrived.clear()
            ready = [stream for stream in self._inputs if stream.ready and not stream.over]
            jobs = [stream.take() for stream in ready]
            if not jobs:
                continue
            found: Sequence[_Found | Exception]
            try:
                found = await loop.run_in_executor(self._thread, _process, jobs)
            except Exception as error:
                found = [error] * len(jobs)
            for stream, job, one in zip(ready, jobs, found, strict=True):
                stream.give(one, job.last)


def _process(jobs: Sequence[_Job]) -> list[_Found]:
    turns = feed_streams([job.stream for job in jobs], [job.block for job in jobs])
    for job, own in zip(jobs, turns, strict=True):
        if job.last:
            own += job.stream.finish()
    return [
        _Found(own, [job.stream.speaking_since(c) for c in range(job.block.shape[1])], job.stream.position_s)
        for job, own in zip(jobs, turns, strict=True)
    ]
