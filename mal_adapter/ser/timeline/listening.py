"""A recording for the eye and the ear: its peaks, and its sound as MP3, of one pass over the file in blocks."""

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile

from mal_adapter.ser.paths import existing_sound
from mal_adapter.ser.recognizer.audio import sound_info
from mal_adapter.ser.turns.blocks import recording_blocks

__all__ = ["Listening", "listen"]

#: Peaks per second of a short recording, and the most of a channel: an hour has 25 per second.
PEAKS_PER_S, MOST_PEAKS = 50.0, 90_000
#: The share of peaks that may be clicks, for which speech must not be drawn smaller.
CLICKS = 0.005
#: MP3, which every browser plays, at a constant rate, with which browsers find a time exactly. In kbit/s per channel
#: count, so an hour takes 14 MB, or 22 MB with two channels. (libsndfile has no more than two.)
BITRATES = {1: 32, 2: 48}
#: The rates up to 16 kHz that MP3 has, in Hz, and the bitrates that each has, in kbit/s.
RATES = {8_000: (8, 64), 11_025: (8, 64), 12_000: (8, 64), 16_000: (8, 160)}

Block = npt.NDArray[np.float32]  # (frames, channels)


@dataclass(frozen=True)
class Listening:
    """What a page shows and plays of a recording.

    Args:
        duration_s: The length of the recording in seconds.
        peaks_per_s: How many pairs of peaks a second has.
        peaks: Channel, or None for the mean of all -> (pairs, 2) int8: the lowest and the highest sample of each part.
            127 is the channel's loudest, whatever its level; a few clicks that are louder are cut off.
        mp3: The sound; None if it was not asked for. One channel or two as in the recording; more are averaged.
    """

    duration_s: float
    peaks_per_s: float
    peaks: dict[int | None, npt.NDArray[np.int8]]
    mp3: bytes | None


def listen(path: Path, channels: Iterable[int | None], *, audio: bool = True) -> Listening:
    """Read a recording once, in blocks.

    Args:
        path: The sound file.
        channels: Those whose peaks are wanted; None is the mean of all. Those that the file does not have are left out.
        audio: Whether the sound is wanted too.

    Raises:
        AudioError: The file can't be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "call.wav"
        >>> soundfile.write(path, np.stack([np.full(8_000, 0.5), np.zeros(8_000)], axis=1), 8_000)
        >>> found = listen(path, [0, None])
        >>> found.peaks[0].shape, found.peaks[0][0].tolist(), found.peaks[None][0].tolist(), len(found.mp3) > 1_000
        ((50, 2), [127, 127], [127, 127], True)
    """
    info = sound_info(existing_sound(path))
    rate = info.sampling_rate if info.sampling_rate in RATES else max(RATES)
    wanted = [channel for channel in dict.fromkeys(channels) if channel is None or channel < info.channels]
    peaks_per_s = min(PEAKS_PER_S, MOST_PEAKS / max(info.duration_s, 1.0))
    peaks = _Peaks(wanted, math.ceil(info.duration_s * rate), rate / peaks_per_s)
    mp3 = _Mp3(rate, info.channels) if audio else None
    for block in recording_blocks(path, rate):
        peaks.add(block)
        if mp3 is not None:
            mp3.add(block)
    return Listening(info.duration_s, peaks_per_s, peaks.finished(), None if mp3 is None else mp3.finished())


class _Peaks:
    """The lowest and the highest sample of each part of a recording, per channel."""

    def __init__(self, channels: list[int | None], frames: int, frames_per_part: float) -> None:
        # Parts need not have a whole number of frames; each starts at the next frame.
        starts = np.ceil(np.arange(np.ceil(frames / frames_per_part)) * frames_per_part).astype(np.int64)
        self._starts = starts[starts < frames]
        parts = self._starts.size
        self._low = {channel: np.full(parts, np.inf, np.float32) for channel in channels}
        self._high = {channel: np.full(parts, -np.inf, np.float32) for channel in channels}
        self._position = 0

    def add(self, block: Block) -> None:
        first = int(np.searchsorted(self._starts, self._position, side="right")) - 1
        last = int(np.searchsorted(self._starts, self._position + len(block), side="left"))
        starts = np.maximum(self._starts[first:last] - self._position, 0)
        for channel in self._low:
            samples = block.mean(axis=1) if channel is None else block[:, channel]
            for kept, least in ((self._low[channel], np.minimum), (self._high[channel], np.maximum)):
                kept[first:last] = least(kept[first:last], least.reduceat(samples, starts))
        self._position += len(block)

    def finished(self) -> dict[int | None, npt.NDArray[np.int8]]:
        return {channel: _scaled(self._low[channel], self._high[channel]) for channel in self._low}


def _scaled(low: npt.NDArray[np.float32], high: npt.NDArray[np.float32]) -> npt.NDArray[np.int8]:
    pairs = np.nan_to_num(np.stack((low, high), axis=1), posinf=0.0, neginf=0.0)
    heights = np.abs(pairs).max(axis=1)
    loudest = (np.quantile(heights, 1 - CLICKS) or heights.max()) if heights.size else 0.0
    return np.round((pairs / (loudest or 1.0)).clip(-1, 1) * 127).astype(np.int8)


class _Mp3:
    """An MP3 file in main memory that grows block by block."""

    def __init__(self, sampling_rate: int, channels: int) -> None:
        self._mixed = channels > max(BITRATES)
        count = 1 if self._mixed else channels
        slow, fast = RATES[sampling_rate]
        bitrate = min(BITRATES[count], fast)
        self._bytes = io.BytesIO()
        self._file = soundfile.SoundFile(
            self._bytes, "w", sampling_rate, count, "MPEG_LAYER_III", format="MP3", bitrate_mode="CONSTANT",
            compression_level=(fast - bitrate) / (fast - slow),
        )  # fmt: skip

    def add(self, block: Block) -> None:
        self._file.write((block.mean(axis=1, keepdims=True) if self._mixed else block).clip(-1, 1))

    def finished(self) -> bytes:
        self._file.close()
        return self._bytes.getvalue()
