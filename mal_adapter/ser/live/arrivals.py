"""`Arrivals`: when each part of a stream came."""

from collections import deque

__all__ = ["Arrivals"]

#: Seconds of the stream for which one time is kept.
_STEP_S = 0.01


class Arrivals:
    """The times at which the blocks of a stream came, to 10 ms of the stream.

    Args:
        kept_s: How many seconds of the stream are remembered.

    Example:
        >>> arrivals = Arrivals(kept_s=30.0)
        >>> arrivals.add(until_s=0.5, at_s=100.0)
        >>> arrivals.add(until_s=1.0, at_s=100.6)
        >>> arrivals.of(0.4), arrivals.of(0.7)
        (100.0, 100.6)
    """

    def __init__(self, kept_s: float) -> None:
        self._kept_s = kept_s
        self._times: deque[tuple[float, float]] = deque()

    def add(self, until_s: float, at_s: float) -> None:
        """The stream up to a second of it has come at a time of any clock."""
        if not self._times or until_s - self._times[-1][0] >= _STEP_S:
            self._times.append((until_s, at_s))
        while self._times[0][0] < until_s - self._kept_s:
            self._times.popleft()
        self._newest = at_s

    def of(self, second_s: float) -> float:
        """When a second of the stream came."""
        return next((at_s for until_s, at_s in self._times if until_s >= second_s), self._newest)
