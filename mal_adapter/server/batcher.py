"""`Batcher`: collects what arrives within a short time, for one forward."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from mal_adapter.server.limits import Limits

__all__ = ["Batcher", "UnwantedError"]

Item = TypeVar("Item")
Answer = TypeVar("Answer")

#: While one batch runs in the model, the next one's audio is decoded, and the last one's states are saved.
WORKERS = 2


class UnwantedError(Exception):
    """Nobody waits for the answer any more, so the item was not processed."""


@dataclass(eq=False)
class _Job(Generic[Item, Answer]):
    item: Item
    wanted: Callable[[], Awaitable[bool]]
    queued_at_s: float
    taken: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    answer: "asyncio.Future[Answer]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher(Generic[Item, Answer]):
    """Runs items in batches, in the order in which they are submitted. All methods belong to one event loop.

    Args:
        run: Called with the items of a batch in a thread, up to two calls at once. Returns an answer or an error per
            item, in their order.
        limits: `batch` and `wait_ms` are used.

    Attributes:
        taken: Called with the size of each batch.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Answer | Exception]],
        limits: Limits,
    ) -> None:
        self._run = run
        self._limits = limits
        self.taken: Callable[[int], None] = lambda size: None
        self._queue: deque[_Job[Item, Answer]] = deque()
        self._tasks: list[asyncio.Task[None]] = []
        self._running = 0

    def __len__(self) -> int:
        """How many items wait."""
        return len(self._queue)

    def start(self) -> None:
        """Begin to process items."""
        self._arrived = asyncio.Event()
        self._collecting = asyncio.Lock()
        self._threads = ThreadPoolExecutor(WORKERS, thread_name_prefix="mal_adapter_batch")
        self._tasks = [asyncio.create_task(self._work()) for _ in range(WORKERS)]

    async def stop(self) -> None:
        """Process no more items. Batches that are running end in their threads, and nobody waits for them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def submit(self, item: Item, timeout_s: float, wanted: Callable[[], Awaitable[bool]]) -> Answer:
        """Wait for the answer to an item.

        Args:
            item: The item.
            timeout_s: Seconds in which its batch must begin. A batch that has begun is not interrupted.
            wanted: Asked just before the batch begins.

        Raises:
            TimeoutError: The batch has not begun in time, and the item was not processed.
            UnwantedError: It was not wanted any more.
            Exception: The item's own error.
        """
        loop = asyncio.get_running_loop()
        job = _Job[Item, Answer](item, wanted, loop.time())
        self._queue.append(job)
        self._arrived.set()
        try:
            await asyncio.wait([job.taken], timeout=max(0.0, timeout_s))
        finally:
            if not job.taken.done():
                self._queue.remove(job)
        if not job.taken.done():
            raise TimeoutError
        return await job.answer

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            jobs = await self._collect()
            answers: Sequence[Answer | Exception] = []
            try:
                if jobs:
                    self.taken(len(jobs))
                    answers = await loop.run_in_executor(self._threads, self._run, [job.item for job in jobs])
            except Exception as error:
                answers = [error] * len(jobs)
            finally:
                self._running -= 1
                self._arrived.set()  # a batch that is not full may begin now
            for job, answer in zip(jobs, answers, strict=True):
                if job.answer.done():  # its request was cancelled
                    continue
                if isinstance(answer, Exception):
                    job.answer.set_exception(answer)
                else:
                    job.answer.set_result(answer)

    async def _collect(self) -> list[_Job[Item, Answer]]:
        """The next batch: as soon as it is full, or its first item has waited long enough and no batch is running."""
        loop = asyncio.get_running_loop()
        async with self._collecting:
            while True:
                self._arrived.clear()
                if not self._queue:
                    await self._arrived.wait()
                    continue
                if len(self._queue) >= self._limits.batch:
                    break
                left_s = self._queue[0].queued_at_s + self._limits.wait_ms / 1000 - loop.time()
                if left_s <= 0 and not self._running:
                    break
                # While the model is busy, waiting for more costs nothing.
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._arrived.wait(), None if self._running else left_s)
            self._running += 1
            jobs = [self._queue.popleft() for _ in range(min(len(self._queue), self._limits.batch))]
            for job in jobs:
                job.taken.set_result(None)
        wanted = []
        for job in jobs:
            if await job.wanted():
                wanted.append(job)
            elif not job.answer.done():
                job.answer.set_exception(UnwantedError())
        return wanted
