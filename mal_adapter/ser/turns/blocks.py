"""A recording, block by block: resampled, with its channels apart or averaged, never as a whole in memory."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soxr

from mal_adapter.ser.paths import existing_sound
from mal_adapter.ser.recognizer.audio import as_audio_errors
from mal_adapter.ser.recognizer.sound.levels import CANCELLED
from mal_adapter.ser.recognizer.sound.opening import open_sound
from mal_adapter.ser.recognizer.sound.source import DamagedSoundError

__all__ = ["recording_blocks"]

Block = npt.NDArray[np.float32]  # (samples, channels)


def recording_blocks(path: str | os.PathLike[str], sampling_rate: int, *, mixed: bool = False) -> Iterator[Block]:
    """Decode and resample a recording in blocks of some seconds.

    Args:
        path: A sound file of any length.
        sampling_rate: Of the blocks, in Hz.
        mixed: Whether the channels are averaged.

    Yields:
        (samples, channels) float32; one channel if `mixed`. Together they are as long as the recording.

    Raises:
        AudioError: The file is missing, unreadable, damaged or not finite, or the channels that are averaged cancel.
        AudioFormatError: The file is of no audio format that can be read here.

    Example:
        >>> import soundfile, tempfile
        >>> path = Path(tempfile.mkdtemp()) / "call.wav"
        >>> soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, (44_100, 2)), 44_100)
        >>> [block.shape for block in recording_blocks(path, 16_000, mixed=True)]
        [(16000, 1)]
    """
    path = existing_sound(Path(path))
    with as_audio_errors(path), open_sound(path) as sound:
        channels = 1 if mixed else sound.channels
        resampler = None
        if sound.sampling_rate != sampling_rate:
            resampler = soxr.ResampleStream(sound.sampling_rate, sampling_rate, channels, dtype="float32")
        position = 0
        independent, mean = 0.0, 0.0
        for block in sound.blocks(0, sound.frames):
            position += len(block)
            if not np.isfinite(block).all():
                raise DamagedSoundError(
                    "the audio contains values that are not finite (NaN or infinity); export it again"
                )
            if mixed and sound.channels > 1:
                independent += float(np.square(block, dtype=np.float64).sum()) / sound.channels**2
                block = block.mean(axis=1, keepdims=True)
                mean += float(np.square(block, dtype=np.float64).sum())
            if resampler is not None:
                block = resampler.resample_chunk(block, last=position == sound.frames)
            yield block
        if mean < CANCELLED * independent:
            raise DamagedSoundError(
                "its channels cancel each other: one is the inverse of another, and their mean has almost no sound; "
                "name the channels"
            )
