"""`History`: the last seconds of a stream, and parts of them at the host's rate."""

import math
from collections import deque

import numpy as np
import soxr

from mal_adapter.ser.live.codecs import Samples
from mal_adapter.ser.recognizer.audio import MARGIN, Waveform

__all__ = ["History"]


class History:
    """Keeps samples of a stream until they are dropped.

    Args:
        sampling_rate: Of the stream, in Hz.
        wanted: The rate of the parts, in Hz.
        channels: Of the stream.

    Example:
        >>> history = History(8_000, 16_000, channels=2)
        >>> history.append(np.zeros((800, 2), dtype=np.float32))
        >>> history.part(0.02, 0.08, channel=1).shape
        (960,)
        >>> history.drop(0.05)
        >>> history.seconds
        0.1
    """

    def __init__(self, sampling_rate: int, wanted: int, channels: int) -> None:
        self._rate = sampling_rate
        self._wanted = wanted
        self._margin = 0 if sampling_rate == wanted else -(-MARGIN * sampling_rate // min(sampling_rate, wanted))
        self._blocks: deque[Samples] = deque()
        self._start = 0
        self._frames = 0
        self._channels = channels

    @property
    def seconds(self) -> float:
        """The length of what is kept."""
        return self._frames / self._rate

    def append(self, block: Samples) -> None:
        """Continue with a block, (frames, channels)."""
        self._blocks.append(block)
        self._frames += len(block)

    def drop(self, before_s: float) -> None:
        """Forget what no part from this second on needs."""
        unit = self._rate // math.gcd(self._rate, self._wanted)
        before = int(before_s * self._rate) - self._margin - unit
        while self._blocks and self._start + len(self._blocks[0]) <= before:
            gone = len(self._blocks.popleft())
            self._start += gone
            self._frames -= gone

    def part(self, start_s: float, end_s: float, channel: int, known_s: float = math.inf) -> Waveform:
        """A part of one channel, resampled as within the whole stream.

        Args:
            start_s: From the start of the stream; not dropped yet.
            end_s: Not after `known_s`. The last samples differ slightly from those of the whole stream if less than
                32 ms after them is known.
            channel: From 0.
            known_s: What comes later is not used.

        Returns:
            (samples,) float32 at the wanted rate, the same samples that `load_waveform` takes from a file.
        """
        start, end = round(start_s * self._wanted), round(end_s * self._wanted)
        unit = math.gcd(self._rate, self._wanted)
        step_in, step_out = self._rate // unit, self._wanted // unit
        # Both rates have a sample at the same time once per step. The part has to start there.
        steps = max(0, start * step_in // step_out - self._margin) // step_in
        stop = -(-end * step_in // step_out) + self._margin
        if known_s < math.inf:
            stop = min(stop, round(known_s * self._rate))
        mono = np.ascontiguousarray(self._between(steps * step_in, stop)[:, channel])
        if self._rate != self._wanted:
            mono = soxr.resample(mono, self._rate, self._wanted)
        skipped = start - steps * step_out
        return np.asarray(mono[skipped : skipped + end - start], dtype=np.float32)

    def _between(self, start: int, stop: int) -> Samples:
        place, parts = self._start, []
        for block in self._blocks:
            if place + len(block) > start and place < stop:
                parts.append(block[max(0, start - place) : stop - place])
            place += len(block)
        return np.concatenate(parts) if parts else np.zeros((0, self._channels), dtype=np.float32)
