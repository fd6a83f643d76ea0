"""From a sound file to a waveform: decoding, resampling, and checks of the audio."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from math import gcd
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import soxr
from transformers.audio_utils import load_audio
from transformers.utils import is_torchcodec_available

from mal_adapter.errors import AudioError, AudioFormatError, AudioTooLongError, MissingDependencyError
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.paths import existing_sound
from mal_adapter.ser.recognizer.sound.levels import Levels
from mal_adapter.ser.recognizer.sound.opening import OpenSound, open_sound
from mal_adapter.ser.recognizer.sound.reader import TOLERANCE_S, UnknownFormatError
from mal_adapter.ser.recognizer.sound.source import DamagedSoundError, open_regular_file

__all__ = [
    "LONGEST_S",
    "MARGIN",
    "SoundInfo",
    "Waveform",
    "as_audio_errors",
    "check_waveform",
    "load_waveform",
    "sound_info",
]

Waveform = npt.NDArray[np.float32]

#: The longest utterance, in seconds. A few bytes can unpack to days, and no host takes an hour at once.
LONGEST_S = 3600.0
#: Samples (of the lower of both rates) that a part needs on either side, to be resampled as within the whole file.
MARGIN = 256


class SoundInfo(NamedTuple):
    """The contents of a sound file's headers, checked against the file.

    Attributes:
        duration_s: The length in seconds.
        sampling_rate: In Hz.
        channels: The number of channels.
    """

    duration_s: float
    sampling_rate: int
    channels: int


def load_waveform(utterance: Utterance, sampling_rate: int = 16_000) -> Waveform:
    """Decode one utterance to mono float32, resampled, cut to its start and end.

    soundfile reads WAV, RF64, W64, AIFF, AU, CAF, NIST, FLAC, OGG and MP3. PyAV, of the extra `recordings`, reads what
    browsers and phones record: WebM, MP4, M4A, 3GP, AAC, AMR and WMA. Without it, and for other formats, transformers'
    `load_audio` is tried, if torchcodec is installed. Channels are averaged, unless the utterance names one. Of a long
    file only the part between start and end is decoded. A file whose header does not give its length is read to the
    end.

    Args:
        utterance: Only its `audio`, `start_s`, `end_s` and `channel` are used.
        sampling_rate: Of the result, in Hz.

    Returns:
        (samples,) float32, finite, at least one sample, not silent.

    Raises:
        AudioError: The file is missing, unreadable, damaged, cut short, longer than its header says, empty, silent or
            not finite, its channels cancel, it has no such channel, or it ends before the utterance does. The message
            names the file, the reason and what to do.
        AudioFormatError: The file is of no audio format that can be read here.
        AudioTooLongError: The utterance is longer than an hour.
        MissingDependencyError: torchcodec, which would decode the file, is installed but can't be imported, or can't
            give one channel.

    Example:
        >>> import soundfile, tempfile
        >>> path = Path(tempfile.mkdtemp()) / "tone.wav"
        >>> soundfile.write(path, 0.1 * np.sin(np.arange(44_100 * 2) / 20), 44_100)
        >>> load_waveform(Utterance("d", "0", "A", path, start_s=0.5, end_s=1.5)).shape
        (16000,)
        >>> load_waveform(Utterance("d", "0", "A", path, start_s=0.5, end_s=9.5))
        Traceback (most recent call last):
        mal_adapter.errors.AudioError: ...: the utterance goes from 0.50 s to 9.50 s, but the file lasts 2.00 s; ...
    """
    path = existing_sound(utterance.audio)
    whole = utterance.start_s is None and utterance.end_s is None
    with as_audio_errors(path):
        try:
            with open_sound(path) as sound:
                _check_channel(utterance.channel, sound.channels)
                if whole:
                    return _decode(sound, sampling_rate, utterance.channel)
                first, last = _cut(utterance, sound.duration_s, sampling_rate)
                return _decode_part(sound, sampling_rate, first, last, utterance.channel)
        except UnknownFormatError as error:
            waveform = _decode_elsewhere(path, sampling_rate, utterance.channel, error)
    with as_audio_errors(path):
        if not whole:
            first, last = _cut(utterance, waveform.size / sampling_rate, sampling_rate)
            waveform = waveform[first:last]
    check_waveform(waveform, path, sampling_rate, whole=whole)
    return waveform


def check_waveform(waveform: Waveform, path: Path, sampling_rate: int, *, whole: bool = False) -> None:
    """Check the samples of an utterance that no decoder of this library has checked.

    Args:
        waveform: (samples,) float32.
        path: The name of the recording, for the message.
        sampling_rate: In Hz.
        whole: Whether these are all samples of the recording.

    Raises:
        AudioError: The samples are empty, silent or not finite.
    """
    with as_audio_errors(path):
        _check_some(waveform.size, sampling_rate)
        levels = Levels(1, sampling_rate, lossy=True)
        levels.add(waveform[:, np.newaxis])
        levels.check(at_start=whole, at_end=whole)


def sound_info(path: Path, longest_s: float | None = None) -> SoundInfo:
    """Check the headers and the size of a sound file. Formats that PyAV reads are decoded once, to know their length.

    Args:
        path: A file of a format that `load_waveform` reads without `load_audio`.
        longest_s: Do not decode more than this, in seconds.

    Returns:
        Its length, rate and channels.

    Raises:
        AudioError: As `load_waveform`, as far as the headers and the size show it.
        AudioFormatError: The file has none of these formats.
        AudioTooLongError: It had to be decoded, and is longer than `longest_s`.

    Example:
        >>> import soundfile, tempfile
        >>> path = Path(tempfile.mkdtemp()) / "tone.flac"
        >>> soundfile.write(path, np.zeros((8_000, 2)), 8_000)
        >>> sound_info(path)
        SoundInfo(duration_s=1.0, sampling_rate=8000, channels=2)
    """
    with as_audio_errors(path), open_sound(path, longest_s) as sound:
        return SoundInfo(sound.duration_s, sound.sampling_rate, sound.channels)


def _decode(sound: OpenSound, sampling_rate: int, channel: int | None) -> Waveform:
    """Decode the whole recording."""
    _check_length(sound.duration_s)
    return _decode_frames(sound, sampling_rate, channel, 0, sound.frames, 0, sound.frames)


def _decode_part(sound: OpenSound, sampling_rate: int, start: int, end: int, channel: int | None) -> Waveform:
    """Decode the samples `start` to `end` of the resampled recording, and little more than them."""
    _check_length((end - start) / sampling_rate)
    rate = sound.sampling_rate
    unit = gcd(rate, sampling_rate)
    step_in, step_out = rate // unit, sampling_rate // unit
    margin = 0 if rate == sampling_rate else -(-MARGIN * rate // min(rate, sampling_rate))
    first = min(sound.frames, start * step_in // step_out)
    last = min(sound.frames, -(-end * step_in // step_out))
    # Input and output samples coincide once per step. The part has to start there, to be resampled as the whole is.
    steps = max(0, first - margin) // step_in
    stop = min(sound.frames, last + margin)
    waveform = _decode_frames(sound, sampling_rate, channel, steps * step_in, stop, first, last)
    skipped = start - steps * step_out
    return waveform[skipped : skipped + end - start].copy()  # without the margins


def _decode_frames(
    sound: OpenSound, sampling_rate: int, channel: int | None, start: int, stop: int, first: int, last: int
) -> Waveform:
    """Decode the frames `start` to `stop` of a channel, or of the mean of all, resampled. Levels are checked from
    `first` to `last` only."""
    _check_some(last - first, sound.sampling_rate)
    levels = Levels(sound.channels if channel is None else 1, sound.sampling_rate, sound.lossy)
    resampler = None
    if sound.sampling_rate != sampling_rate:
        resampler = soxr.ResampleStream(sound.sampling_rate, sampling_rate, 1, dtype="float32")
    # One array, since a list of pieces and their concatenation would take twice the memory.
    waveform = np.empty(-(-(stop - start) * sampling_rate // sound.sampling_rate) + 1, dtype=np.float32)
    filled = 0
    position = start
    for block in sound.blocks(start, stop):
        if channel is not None:
            block = block[:, channel : channel + 1]
        levels.add(block[max(0, first - position) : max(0, last - position)])
        position += len(block)
        mono = block.mean(axis=1)
        piece = mono if resampler is None else resampler.resample_chunk(mono, last=position == stop)
        waveform[filled : filled + piece.size] = piece
        filled += piece.size
    levels.check(at_start=first == 0, at_end=last == sound.frames)
    waveform = waveform[:filled]
    if not np.isfinite(waveform).all():
        raise DamagedSoundError("the audio contains values that are too large to be resampled; export it again")
    return waveform


def _cut(utterance: Utterance, duration_s: float, sampling_rate: int) -> tuple[int, int]:
    """The first sample of an utterance and the one after its last, at `sampling_rate`."""
    start_s = utterance.start_s or 0.0
    end_s = duration_s if utterance.end_s is None else utterance.end_s
    if start_s >= duration_s or end_s > duration_s + TOLERANCE_S:
        raise DamagedSoundError(
            f"the utterance goes from {start_s:.2f} s to {end_s:.2f} s, but the file lasts "
            f"{duration_s:.2f} s; check start_s and end_s, which are in seconds"
        )
    return round(start_s * sampling_rate), min(round(end_s * sampling_rate), round(duration_s * sampling_rate))


def _check_channel(channel: int | None, channels: int) -> None:
    if channel is not None and channel >= channels:
        have = "1 channel" if channels == 1 else f"{channels} channels"
        raise DamagedSoundError(
            f"the utterance is in channel {channel}, counted from 0, but the file has {have}; check its channel"
        )


def _check_some(samples: int, sampling_rate: int) -> None:
    if samples <= 0:
        raise DamagedSoundError(f"the audio is empty (0 samples at {sampling_rate} Hz); record or cut it again")


def _check_length(duration_s: float) -> None:
    if duration_s > LONGEST_S:
        raise AudioTooLongError(
            f"the audio lasts {duration_s:.2f} s, and an utterance at most {LONGEST_S:.0f} s; "
            "give its start_s and end_s"
        )


def _decode_elsewhere(path: Path, sampling_rate: int, channel: int | None, error: UnknownFormatError) -> Waveform:
    """Decode with transformers' `load_audio`, which decodes the whole file and averages its channels."""
    if not is_torchcodec_available() or (channel is not None and find_spec("av") is not None):
        raise error
    if channel is not None:
        raise MissingDependencyError(
            f"{path}: one channel of this format is read by PyAV, which is not installed: "
            "pip install 'mal-adapter[recordings]'",
            name="av",
        )
    with open_regular_file(path) as file:
        status = os.fstat(file.fileno())
    try:
        return _load_audio(path.absolute(), sampling_rate, status.st_mtime_ns, status.st_size)
    except ImportError as cause:  # not the file's fault
        reason = " ".join(str(cause).split()).rstrip(".")
        raise MissingDependencyError(
            f"{path}: torchcodec, which decodes this format, can't be imported ({reason}): pip install torchcodec, or "
            "convert the file to WAV, FLAC, OGG or MP3",
            name="torchcodec",
        ) from cause
    except Exception as cause:  # torchcodec's exceptions have no common base
        reason = " ".join(str(cause).split()).rstrip(".") or type(cause).__name__
        raise DamagedSoundError(f"the audio can not be decoded ({reason}); convert or copy it again") from cause


@lru_cache(maxsize=3)  # a recording is read once for all its utterances, also when a few are processed side by side
def _load_audio(path: Path, sampling_rate: int, mtime_ns: int, size: int) -> Waveform:
    # `path` is absolute, since load_audio takes a string that is not an existing file for base64.
    waveform = np.ascontiguousarray(load_audio(str(path), sampling_rate=sampling_rate), dtype=np.float32)
    waveform.flags.writeable = False
    return waveform


@contextmanager
def as_audio_errors(path: Path) -> Iterator[None]:
    """Turn a decoder's error into an `AudioError` that names the file."""
    name = "".join(c if c.isprintable() or 0xDC80 <= ord(c) <= 0xDCFF else repr(c)[1:-1] for c in str(path))
    try:
        yield
    except AudioTooLongError as error:
        raise AudioTooLongError(f"{name}: {error}") from None
    except UnknownFormatError as error:
        advice = "convert it to WAV, FLAC, OGG or MP3"
        raise AudioFormatError(f"{name}: this can not be read as audio ({error}); {advice}") from error.__cause__
    except DamagedSoundError as error:
        raise AudioError(f"{name}: {error}") from error.__cause__
    except MemoryError as error:
        raise AudioError(f"{name}: there is not enough memory for this audio; give start_s and end_s") from error
