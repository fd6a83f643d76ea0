"""The server's metrics, in Prometheus's text format."""

import time
from collections.abc import Callable, Iterable, Sized

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from mal_adapter.errors import MalAdapterError
from mal_adapter.stores.base import SessionStore
from mal_adapter.stores.states import SessionStates

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64)
_RECOUNT_S = 15.0  # counting the sessions of a shared store reads all their names


class Metrics:
    """The metrics of one server. They have no session ids, tenants or addresses.

    Args:
        states: The sessions.
        queued: The number of utterances that wait for a batch.
        pending: The number of requests under way.
        streams: The number of live streams.

    Attributes:
        batch_size: Observe the size of each batch.
        conflicts: Count answers that a conflict made impossible.
        stream_delay: Observe the seconds from the end of speech to its answer.
        stream_audio: Count the seconds of sound of live streams that have ended.
        stream_errors: Count the turns of live streams that were not answered.
    """

    def __init__(
        self,
        states: SessionStates,
        queued: Callable[[], int],
        pending: Callable[[], int],
        streams: Callable[[], int] = lambda: 0,
    ) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "mal_adapter_requests", "Requests answered", ["method", "route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "mal_adapter_request_seconds",
            "Time to answer",
            ["method", "route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.batch_size = Histogram(
            "mal_adapter_batch_size", "Utterances in one forward", buckets=_SIZES, registry=self._registry
        )
        self.conflicts = Counter(
            "mal_adapter_conflicts", "Sessions that another replica continued", registry=self._registry
        )
        self.stream_delay = Histogram(
            "mal_adapter_stream_delay_seconds",
            "From the end of speech in a live stream to its answer",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.stream_audio = Counter(
            "mal_adapter_stream_audio_seconds",
            "Sound of live streams that have ended, in seconds",
            registry=self._registry,
        )
        self.stream_errors = Counter(
            "mal_adapter_stream_errors", "Turns of live streams without an answer", registry=self._registry
        )
        sessions = _Sessions(states.store)
        gauges: Iterable[tuple[str, str, Callable[[], float]]] = (
            ("queue_length", "Utterances that wait for a forward", queued),
            ("pending_requests", "Requests for sessions that are under way", pending),
            ("streams", "Live streams", streams),
            ("sessions", "Sessions in the store; NaN if it can't be reached", sessions),
            ("unsaved_sessions", "Sessions whose last state is only in this process", lambda: len(states.backlog)),
            ("lost_states", "Unsaved states whose sessions another replica continued", lambda: states.backlog.lost),
        )
        for name, what, value in gauges:
            Gauge(f"mal_adapter_{name}", what, registry=self._registry).set_function(value)

    def answered(self, method: str, route: str, status: int, elapsed_s: float) -> None:
        """Count one request."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(elapsed_s)

    def text(self) -> bytes:
        """All metrics. May read the store."""
        text: bytes = generate_latest(self._registry)
        return text


class _Sessions:
    """Counts the sessions of a store, not more often than every quarter of a minute."""

    def __init__(self, store: SessionStore) -> None:
        self._store = store
        self._counted_at_s = -_RECOUNT_S
        self._count = 0.0

    def __call__(self) -> float:
        if isinstance(self._store, Sized):
            return float(len(self._store))
        if time.monotonic() - self._counted_at_s >= _RECOUNT_S:
            try:
                self._count = float(sum(1 for _ in self._store))
            except MalAdapterError:
                self._count = float("nan")
            self._counted_at_s = time.monotonic()
        return self._count
