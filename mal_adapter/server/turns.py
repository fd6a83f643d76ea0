"""`Turns`: the requests of a session take turns, in the order in which they begin."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from weakref import WeakValueDictionary

import anyio

from mal_adapter.server.limits import Limits
from mal_adapter.server.refusals import AGAIN, Refusal

__all__ = ["Turns", "in_time", "timed_out"]


class Turns:
    """A lock per session that requests use.

    Args:
        limits: `max_pending` is used.

    Attributes:
        pending: How many requests are under way, including waiting ones.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.pending = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Within this block a request is under way. Enter it before the body is read.

        Raises:
            Refusal: 503, too many requests are under way.
        """
        if self.pending >= self._limits.max_pending:
            raise Refusal(503, "busy", f"{self.pending} requests are under way; send it again later", AGAIN)
        self.pending += 1
        try:
            yield
        finally:
            self.pending -= 1

    @asynccontextmanager
    async def locked(self, *stored_ids: str) -> AsyncIterator[None]:
        """Lock sessions, for requests in the order in which they begin. Enter one such block per request."""
        async with AsyncExitStack() as held:
            for stored_id in sorted(set(stored_ids)):  # the same order everywhere, or two requests would wait forever
                lock = self._locks.setdefault(stored_id, asyncio.Lock())
                await held.enter_async_context(lock)
            yield

    @asynccontextmanager
    async def of(self, stored_id: str) -> AsyncIterator[None]:
        """Both, for one session.

        Raises:
            Refusal: 503, too many requests are under way.
        """
        with self.counted():
            async with self.locked(stored_id):
                yield


@contextmanager
def in_time(timeout_s: float) -> Iterator[anyio.CancelScope]:
    """Refuse a request whose upload and wait take too long. Yields the scope, whose deadline may be moved.

    Raises:
        Refusal: 503.
    """
    try:
        with anyio.fail_after(timeout_s) as scope:
            yield scope
    except TimeoutError:
        raise timed_out(timeout_s) from None


def timed_out(timeout_s: float) -> Refusal:
    """The answer to a request whose upload and wait took too long."""
    reason = f"the upload and the wait took more than {timeout_s:g} s; send it again"
    return Refusal(503, "timeout", reason, {**AGAIN, "Connection": "close"})
