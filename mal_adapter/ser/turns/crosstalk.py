"""Crosstalk: speech that one channel has only as a quieter copy of another channel's."""

import numpy as np
import numpy.typing as npt

from mal_adapter.ser.turns.turn import TurnSettings
from mal_adapter.ser.turns.voice import WINDOW_S

__all__ = ["Crosstalk"]

#: Frames per window; each is 8 ms after the one before.
_FRAMES = 4
#: Limits of the bands, in Hz, whose levels are compared.
_BANDS_HZ = (125, 500, 1_000, 2_000, 4_001)
#: A copy is up to so many frames later: 56 ms.
_DELAYS = 8
#: Levels are compared over so many frames before and after: 192 ms.
_SPAN = 24
#: What is found holds for so many windows before and after, where both levels fit: 192 ms.
_REACH = 6
#: Speech may be a copy of the loudest of so many windows before and after: the network notices the end of speech up to
#: 0.15 s later.
_BEFORE, _AFTER = 6, 2
#: Speech that is so many times as strong as a copy would be is more than a copy.
_EXPLAINED = 1.5
#: From this correlation on, one channel's levels are a copy of another's.
_COPY = 0.7

_Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.float32]  # (windows, 2): the probability of speech, and the mean square


class Crosstalk:
    """Removes crosstalk from the probabilities of speech of several channels, window by window.

    Speech in a channel is crosstalk of another one if it is `crosstalk_db` quieter, and its level rises and falls as
    the other's does, at the same time or up to 56 ms later, in four bands over 0.4 s. Real speech during another's
    differs from it, whatever its level. Both sounds are compared up to 0.4 s after a window, so the windows that may be
    crosstalk come that much later than they were fed; all others come as soon as those before them have.

    Args:
        channels: Number of channels.
        sampling_rate: In Hz.
        settings: `threshold` and `crosstalk_db` are used.
        quiet_below: Windows with a lower probability of speech are not speech anyway.
    """

    def __init__(self, channels: int, sampling_rate: int, settings: TurnSettings, quiet_below: float) -> None:
        self._ratio = 10 ** (settings.crosstalk_db / 10)
        self._quiet_below = quiet_below
        self._hop = round(WINDOW_S * sampling_rate) // _FRAMES
        frequencies = np.fft.rfftfreq(2 * self._hop, 1 / sampling_rate)
        self._bins = [int(np.searchsorted(frequencies, limit)) for limit in _BANDS_HZ]
        self._taper = np.hanning(2 * self._hop).astype(np.float32)
        self._context = np.zeros((self._hop, channels), dtype=np.float32)
        #: Of the windows from `_first` on: levels of the frames (frames, channels, bands), and what was fed.
        self._levels = np.zeros((0, channels, len(_BANDS_HZ) - 1))
        self._rows = np.zeros((0, channels, 2), dtype=np.float32)
        self._first = 0
        self._given = [0] * channels  # number of windows that were returned

    def feed(self, samples: npt.NDArray[np.float32], rows: npt.NDArray[np.float32], last: bool = False) -> list[Rows]:
        """Continue with some windows.

        Args:
            samples: (windows * samples per window, channels).
            rows: (windows, channels, 2): the probability of speech and the mean square of each window.
            last: Whether the stream ends here.

        Returns:
            Per channel the rows of the next windows, in order, with a probability of 0 where the speech is crosstalk.
        """
        self._levels = np.concatenate((self._levels, self._frames(samples)))
        self._rows = np.concatenate((self._rows, rows))
        given = [self._next(channel, last) for channel in range(len(self._given))]
        for channel, some in enumerate(given):
            self._given[channel] += len(some)
        # What is before a window reaches into what is found for it.
        keep = min(self._given) - _REACH - -(-(_SPAN + _DELAYS) // _FRAMES)
        if keep > self._first:
            self._levels = self._levels[(keep - self._first) * _FRAMES :]
            self._rows = self._rows[keep - self._first :]
            self._first = keep
        return given

    def _frames(self, samples: npt.NDArray[np.float32]) -> _Floats:
        """The levels of the new frames: (frames, channels, bands), amplitudes."""
        samples = np.concatenate((self._context, samples))
        self._context = samples[-self._hop :].copy()
        count = len(samples) // self._hop - 1
        levels = np.empty((count, *self._levels.shape[1:]))
        step = 4096  # an hour at once would take gigabytes
        for start in range(0, count, step):
            part = samples[start * self._hop : (min(count, start + step) + 1) * self._hop]
            frames = np.lib.stride_tricks.sliding_window_view(part, 2 * self._hop, axis=0)[:: self._hop]
            power = np.square(np.abs(np.fft.rfft(frames * self._taper, axis=2)))
            sums = np.add.reduceat(power[..., : self._bins[-1]], self._bins[:-1], axis=2)
            levels[start : start + len(sums)] = sums**0.5
        return levels

    def _next(self, channel: int, last: bool) -> Rows:
        start, count = self._given[channel] - self._first, len(self._rows)
        rows = self._rows[start:, channel].copy()
        speech = rows[:, 0] >= self._quiet_below
        copies = np.zeros(len(rows), dtype=bool)
        # How many windows can be decided: those with all that is compared after them.
        known = np.full(len(rows), count if last else count - _AFTER) > np.arange(start, count)
        for other in range(len(self._given)):
            if other == channel or not speech.any():
                continue
            loudest = _largest(self._rows[:, other, 1], _BEFORE, _AFTER)[start:]
            suspect = speech & (loudest > self._ratio * rows[:, 1]) & (loudest > 0)
            late = suspect & (np.arange(start, count) >= count - _REACH - _SPAN // _FRAMES) & (not last)
            known &= ~late
            if (suspect & ~late & ~copies).any():
                gains = _largest(self._gains(channel, other), _REACH, _REACH)[start:]
                copies |= suspect & (rows[:, 1] <= _EXPLAINED * gains * loudest)
        open_ = np.flatnonzero(speech & ~known)
        rows = rows[: open_[0]] if open_.size else rows
        rows[copies[: len(rows)], 0] = 0.0
        return rows

    def _gains(self, channel: int, other: int) -> _Floats:
        """The power of a channel as a share of another one's, around each of the windows that are kept; 0 where it is
        not a copy."""
        margin = _SPAN + _DELAYS
        before = np.zeros((margin, self._levels.shape[2]))
        copy, source = (
            np.concatenate((before, self._levels[:, number], before[:_SPAN])) for number in (channel, other)
        )
        centers = margin + _FRAMES // 2 + _FRAMES * np.arange(len(self._rows))
        first, end, count = centers - _SPAN, centers + _SPAN, 2 * _SPAN

        def sums(values: _Floats, delay: int = 0) -> _Floats:
            total = np.concatenate((np.zeros((1, values.shape[1])), np.cumsum(values, axis=0)))
            return np.asarray(total[end - delay] - total[first - delay])

        copy_sum, source_total = sums(copy), np.square(source)
        copy_square = (sums(np.square(copy)) - copy_sum**2 / count).sum(axis=1)
        best = np.zeros(len(centers))
        for delay in range(_DELAYS):
            source_sum = sums(source, delay)
            source_square = (sums(source_total, delay) - source_sum**2 / count).sum(axis=1)
            product = np.zeros_like(source)
            product[delay:] = copy[delay:] * source[: len(source) - delay]
            together = (sums(product) - copy_sum * source_sum / count).sum(axis=1)
            best = np.maximum(best, together / np.sqrt(np.maximum(copy_square * source_square, 1e-30)))
        copy_power, source_power = (sums(levels**2).sum(axis=1) for levels in (copy, source))
        copied = (best >= _COPY) & (source_power >= self._ratio * copy_power)
        return np.where(copied, copy_power / np.maximum(source_power, 1e-30), 0.0)


def _largest(values: npt.NDArray[np.generic], before: int, after: int) -> _Floats:
    """The largest value within so many places before and after each."""
    padded = np.pad(np.asarray(values, dtype=np.float64), (before, after))
    return np.asarray(np.lib.stride_tricks.sliding_window_view(padded, before + after + 1).max(axis=1))
