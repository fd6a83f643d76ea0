"""`Drain`: the end of a server. New requests are refused, running ones end."""

import asyncio
import contextlib
from collections.abc import Iterator

__all__ = ["Drain"]


class Drain:
    """Counts running requests, and whether new ones are refused.

    Attributes:
        began: Whether new requests are refused.
        running: How many requests are under way.
    """

    def __init__(self) -> None:
        self.began = False
        self.running = 0

    def begin(self) -> None:
        """Refuse new requests from now on."""
        self.began = True

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Within this block a request is running."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    async def wait(self, timeout_s: float) -> bool:
        """Wait until no request is running. Returns whether they ended in time."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self.running and loop.time() < deadline:
            await asyncio.sleep(0.02)
        return not self.running
