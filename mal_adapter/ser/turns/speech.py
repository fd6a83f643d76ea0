"""From the probabilities of speech to its starts and ends, for one channel."""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from mal_adapter.ser.turns.turn import TurnSettings

__all__ = ["HYSTERESIS", "LATE", "ChannelSpeech", "Speech"]

#: A turn ends where the probability falls so far below the threshold for its start. silero-vad itself has 0.15, with
#: which ends come up to 0.2 s late in noise.
HYSTERESIS = 0.05
#: The network notices the end of speech so many windows, 64 ms, later.
LATE = 2
#: The quietest place is the middle of so many windows, 160 ms, which together have the least power.
_QUIET = 5


@dataclass(frozen=True, order=True)
class Speech:
    """Speech in one channel, between two pauses.

    Args:
        start_s: In seconds from the start of the stream.
        end_s: In seconds.
        channel: From 0.
    """

    start_s: float
    end_s: float
    channel: int = 0


class ChannelSpeech:
    """The speech of one channel, window by window.

    Args:
        number: Of the channel, from 0.
        sampling_rate: In Hz.
        window: In samples.
        settings: As for `SpeechDetector`.

    Example:
        >>> channel = ChannelSpeech(0, 8_000, 256, TurnSettings())
        >>> channel.feed([0.1, 0.9, 0.9, 0.9] + [0.8] * 6 + [0.1] * 12, [0.0] * 22)
        [Speech(start_s=0.032, end_s=0.256, channel=0)]
    """

    def __init__(self, number: int, sampling_rate: int, window: int, settings: TurnSettings) -> None:
        self.number = number
        self._rate = sampling_rate
        self._window = window
        self._start_at, self._end_below = settings.threshold, settings.threshold - HYSTERESIS
        self._pause = settings.merge_s * sampling_rate
        self._shortest = settings.min_s * sampling_rate
        self._longest = math.inf
        if settings.max_s is not None:
            # Padding must fit in, and the parts must be longer than the shortest.
            self._longest = max(settings.max_s - 2 * settings.pad_s, settings.max_s / 2) * sampling_rate
        self._position = 0  # in samples, as all of these
        self._start: int | None = None
        self._silent_from: int | None = None  # where the speech may have ended
        self._powers: deque[float] = deque()  # of the windows from the one that has the start

    @property
    def since_s(self) -> float | None:
        """The start of speech that has not ended, in seconds; None in a pause."""
        return None if self._start is None else self._start / self._rate

    @property
    def settled_s(self) -> float:
        """All speech that `feed` and `finish` have not returned yet starts at this time, in seconds, or later."""
        return (self._position if self._start is None else self._start) / self._rate

    def feed(self, probabilities: list[float], powers: list[float]) -> list[Speech]:
        """Continue with some windows: the probability of speech and the mean square of each.

        Returns:
            The speech that has ended in them.
        """
        found: list[Speech] = []
        for probability, power in zip(probabilities, powers, strict=True):
            position = self._position
            self._position += self._window
            if probability >= self._start_at:
                self._silent_from = None
                if self._start is None:
                    self._start = position
            elif probability < self._end_below and self._start is not None:
                if self._silent_from is None:
                    self._silent_from = position
                if position - self._silent_from >= self._pause:
                    found += self._ended(position)
            if self._start is None or self._longest == math.inf:
                continue
            self._powers.append(power)
            while self._silent_from is None and self._position - self._start > self._longest:
                found.append(self._split())
        return found

    def finish(self, end: int) -> list[Speech]:
        """End the stream at a sample."""
        return self._ended(end)

    def _ended(self, end: int) -> list[Speech]:
        """The speech that ends in a pause, or with the stream."""
        start, silent_from = self._start, self._silent_from
        self._start, self._silent_from = None, None
        self._powers.clear()
        if start is None or (silent_from or end) - start < self._shortest:
            return []
        return [self._speech(start, end if silent_from is None else max(start + 1, silent_from - LATE * self._window))]

    def _split(self) -> Speech:
        """Cut off the first part of the speech, at the quietest place within the second half of the longest part."""
        start = self._start or 0
        first = start // self._window  # the window of `_powers[0]`
        powers = np.array(self._powers)
        smooth = np.convolve(powers, np.full(_QUIET, 1 / _QUIET), mode="same")
        lowest = math.ceil((start + max(self._longest / 2, self._shortest)) / self._window) - first
        highest = math.floor((start + self._longest - self._shortest) / self._window) - first
        place = lowest + int(np.argmin(smooth[lowest : max(highest, lowest + 1)]))
        cut = (first + place) * self._window + self._window // 2
        for _ in range(place):
            self._powers.popleft()
        self._start = cut
        return self._speech(start, cut)

    def _speech(self, start: int, end: int) -> Speech:
        return Speech(start / self._rate, end / self._rate, self.number)
