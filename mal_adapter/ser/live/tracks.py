"""`Tracks`: the directions of a call side by side, from chunks that may be lost, repeated, late or early."""

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mal_adapter.ser.live.codecs import Samples

__all__ = ["Tracks"]

#: Seconds of chunks that wait for one before them; then that one is lost.
WAITING_S = 0.1
#: So many chunks wait at most, however short they are.
MOST_WAITING = 50
#: Seconds that a track may be behind another one; then silence takes its place. A lost chunk must not cause this.
BEHIND_S = 0.2
#: Seconds by which a chunk's time may differ from its place. Providers' clocks are not exact.
TOLERANCE_S = 0.1
#: The longest silence that takes the place of lost chunks, in seconds. A wrong time stamp must not fill the memory.
LONGEST_S = 60.0

_Track = npt.NDArray[np.float32]


class Tracks:
    """Puts the chunks of each track in order, and the tracks side by side.

    Args:
        names: Of the tracks.
        sampling_rate: In Hz.
    """

    def __init__(self, names: Sequence[str], sampling_rate: int) -> None:
        self._sampling_rate = sampling_rate
        self._origin_ms: int | None = None
        self._tracks = {name: _Ordered(sampling_rate) for name in names}

    def add(self, name: str, samples: _Track, chunk: int | None = None, time_ms: int | None = None) -> Samples:
        """Add a chunk.

        Args:
            name: Of its track.
            samples: (frames,) float32.
            chunk: Its number within the track, if known.
            time_ms: When it begins, in milliseconds of any clock that all tracks share, if known.

        Returns:
            (frames, tracks) that are now known of all tracks.
        """
        if time_ms is not None and self._origin_ms is None:
            self._origin_ms = time_ms
        place = None
        if time_ms is not None and self._origin_ms is not None:
            place = round((time_ms - self._origin_ms) * self._sampling_rate / 1000)
        self._tracks[name].add(samples, chunk, place)
        furthest = max(track.ready for track in self._tracks.values())
        for track in self._tracks.values():
            track.fill(furthest - round(BEHIND_S * self._sampling_rate))
        return self._take(min(track.ready for track in self._tracks.values()))

    def finish(self) -> Samples:
        """(frames, tracks) of the rest; silence where a track has less than another."""
        for track in self._tracks.values():
            track.flush()
        furthest = max(track.ready for track in self._tracks.values())
        for track in self._tracks.values():
            track.fill(furthest)
        return self._take(furthest)

    def _take(self, end: int) -> Samples:
        return np.stack([track.take(end) for track in self._tracks.values()], axis=1)


class _Ordered:
    """The chunks of one track in order."""

    def __init__(self, sampling_rate: int) -> None:
        self._tolerance = round(TOLERANCE_S * sampling_rate)
        self._longest = round(LONGEST_S * sampling_rate)
        self._patience = round(WAITING_S * sampling_rate)
        self._waiting: list[tuple[int, int, _Track, int | None]] = []
        self._arrived = 0
        self._last: int | None = None
        """The number of the last chunk that has its place."""
        self._parts: list[_Track] = []
        self._taken = 0
        self._owed = 0
        """Silence that was put in for chunks that may still come."""
        self.ready = 0
        """The place of the first frame that is not known yet."""

    def add(self, samples: _Track, chunk: int | None, place: int | None) -> None:
        """Add a chunk in any order."""
        if chunk is None:
            return self._put(samples, 0, place)
        if self._last is not None and chunk <= self._last:
            return  # repeated, or so late that silence has taken its place
        self._arrived += 1  # so that the samples are never compared
        heapq.heappush(self._waiting, (chunk, self._arrived, samples, place))
        while self._waiting and (self._is_next(self._waiting[0][0]) or self._too_many()):
            self._put_first()

    def flush(self) -> None:
        """Take the chunks that wait; those before them are lost."""
        while self._waiting:
            self._put_first()

    def fill(self, end: int) -> None:
        """Put in silence up to a place, unless the track is there."""
        missing = min(end - self.ready, self._longest)
        if missing > 0:
            self._append(np.zeros(missing, dtype=np.float32))
            self._owed += missing

    def take(self, end: int) -> _Track:
        """(frames,) from where the last call ended up to a place that is ready."""
        joined = np.concatenate(self._parts) if self._parts else np.zeros(0, dtype=np.float32)
        count = end - self._taken
        self._taken = end
        self._parts = [joined[count:]] if count < joined.size else []
        return joined[:count]

    def _too_many(self) -> bool:
        held = sum(samples.size for _, _, samples, _ in self._waiting)
        return held > self._patience or len(self._waiting) > MOST_WAITING

    def _is_next(self, chunk: int) -> bool:
        return self._last is None or chunk <= self._last + 1

    def _put_first(self) -> None:
        chunk, _, samples, place = heapq.heappop(self._waiting)
        if self._last is not None and chunk <= self._last:
            return
        lost = 0 if self._last is None else chunk - self._last - 1
        self._last = chunk
        self._put(samples, lost, place)

    def _put(self, samples: _Track, lost: int, place: int | None) -> None:
        """Append a chunk before which `lost` ones are missing."""
        if place is None:
            place = self.ready + lost * samples.size
        ahead = place - self.ready
        if ahead > (0 if lost else self._tolerance):
            self._append(np.zeros(min(ahead, self._longest), dtype=np.float32))
            self._owed = 0
        elif self._owed and ahead < 0:
            late = min(self._owed, -ahead, samples.size)
            samples = samples[late:]
            self._owed -= late
        else:
            self._owed = 0
        self._append(samples)

    def _append(self, samples: _Track) -> None:
        self._parts.append(samples)
        self.ready += samples.size
