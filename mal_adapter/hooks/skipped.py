"""`SkippedWrites`: which writes of a session were skipped, without waiting for the device that counts them."""

import threading
from collections import deque

import torch
from jaxtyping import Int64
from torch import Tensor

__all__ = ["SkippedWrites"]

Counts = Int64[Tensor, " batch"]


class _Copy:
    """The numbers of a device, on their way to the host behind all that is queued there."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._arrival: torch.cuda.Event | None = None
        if counts.is_cuda:
            self._counts = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
            self._counts.copy_(counts, non_blocking=True)
            self._arrival = torch.cuda.current_stream(counts.device).record_event()

    def arrived(self) -> bool:
        """Whether reading waits for nothing. On a device without events that is not known."""
        if self._arrival is None:
            return self._counts.is_cpu
        return bool(self._arrival.query())  # type: ignore[no-untyped-call]

    def read(self) -> list[int]:
        """The numbers; waits until they have arrived."""
        if self._arrival is not None:
            self._arrival.synchronize()
        numbers: list[int] = self._counts.tolist()
        return numbers


class SkippedWrites:
    """The counters of skipped writes from before and after each write of a session."""

    def __init__(self) -> None:
        self._writes: deque[tuple[_Copy, _Copy]] = deque()
        self._last: tuple[Counts, _Copy] | None = None
        self._lock = threading.Lock()  # threads may share a session

    def note(self, before: Counts, after: Counts) -> None:
        """A write is queued that takes the counters from `before` to `after`."""
        with self._lock:
            first = self._last[1] if self._last is not None and self._last[0] is before else _Copy(before)
            self._last = after, _Copy(after)
            self._writes.append((first, self._last[1]))

    def look(self, *, wait: bool) -> bool:
        """Whether one of the writes that were not looked at yet was skipped: of all of them, or of those whose numbers
        are on the host already."""
        skipped = False
        with self._lock:
            while self._writes and (wait or self._writes[0][1].arrived()):
                before, after = self._writes.popleft()
                skipped = skipped or after.read() != before.read()
        return skipped
