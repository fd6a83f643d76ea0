"""The counters of the engine's memory on vLLM's own `/metrics`.

They are counted in a worker, which is another process than the one that answers `/metrics`; so the API server asks the
engine for them every few seconds.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from mal_adapter.vllm.counters import HELP

__all__ = ["EVERY_S", "MemoryMetrics"]

log = logging.getLogger("vllm.mal_adapter")

EVERY_S = 2.0
PREFIX = "mal_adapter"
_GAUGES = {
    "requests": "Unfinished requests with audio in a session.",
    "sessions": "Sessions in the engine's process, where there is no other store.",
    "sessions_unsaved": "Sessions whose last state is only in the engine's process.",
}


class MemoryMetrics:
    """A collector of prometheus_client: the last numbers that the engine has given."""

    def __init__(self) -> None:
        self.numbers: Mapping[str, Any] = {}

    def register(self) -> None:
        """Show the numbers on `/metrics` of this process, once."""
        from prometheus_client import REGISTRY

        with contextlib.suppress(ValueError):  # a second app in this process
            REGISTRY.register(self)

    def collect(self) -> Iterable[Any]:
        """The counters and gauges; none before the engine has answered."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for kinds, family in ((HELP, CounterMetricFamily), (_GAUGES, GaugeMetricFamily)):
            for name, meaning in kinds.items():
                if (value := self.numbers.get(name)) is not None:
                    yield family(f"{PREFIX}_{name}", meaning, value=value)

    async def keep_up(self, ask: Callable[[], Awaitable[tuple[int, Any]]]) -> None:
        """Ask the engine for its numbers again and again, until this task is cancelled."""
        while True:
            try:
                status, numbers = await ask()
                if status == 200:
                    self.numbers = numbers
            except Exception as error:  # the engine is ending, or busy
                log.debug("no counters of the memory: %s", error)
            await asyncio.sleep(EVERY_S)
