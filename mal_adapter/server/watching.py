"""`Watchers`: who gets the messages of live streams beside the stream itself."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Watchers"]

#: Messages that may wait for a watcher; one that reads so slowly is cut off.
WAITING = 256


class Watchers:
    """The watchers of each session. All methods belong to one event loop."""

    def __init__(self) -> None:
        self._queues: dict[str, set[asyncio.Queue[str | None]]] = {}

    def __len__(self) -> int:
        """How many watchers there are."""
        return sum(map(len, self._queues.values()))

    @contextmanager
    def watching(self, stored_id: str) -> Iterator["asyncio.Queue[str | None]"]:
        """Within this block the queue gets a session's messages, and None at the end of the server or if it is full."""
        queue: asyncio.Queue[str | None] = asyncio.Queue(WAITING)
        self._queues.setdefault(stored_id, set()).add(queue)
        try:
            yield queue
        finally:
            self._queues[stored_id].discard(queue)
            if not self._queues[stored_id]:
                del self._queues[stored_id]

    def publish(self, stored_id: str, message: str) -> None:
        """Send a message to those who watch a session."""
        for queue in list(self._queues.get(stored_id, ())):
            try:
                queue.put_nowait(message)
            except asyncio.QueueFull:
                self._cut(queue)
                self._queues[stored_id].discard(queue)

    def close(self) -> None:
        """Cut off all watchers."""
        for queues in self._queues.values():
            for queue in queues:
                self._cut(queue)

    def _cut(self, queue: "asyncio.Queue[str | None]") -> None:
        while not queue.empty():
            queue.get_nowait()
        queue.put_nowait(None)
