"""From a sound file to a waveform: decoding, and the rules for bad audio."""

import os
import struct
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
from transformers.audio_utils import load_audio
from transformers.utils import is_torchcodec_available

from mal_adapter.errors import AudioError
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.paths import existing_sound

__all__ = ["Waveform", "load_waveform", "sound_path"]

Waveform = npt.NDArray[np.float32]

#: Peak amplitude at or under which audio counts as silent: -80 dBFS, three steps of 16-bit sound.
SILENCE_PEAK = 1e-4
#: How far an utterance may reach beyond the end of its file, or a file fall short of its header, through rounding.
TOLERANCE_S = 0.1


def load_waveform(utterance: Utterance, sampling_rate: int = 16_000) -> Waveform:
    """Decodes one utterance to mono float32, resampled, cut to its start and end.

    Reads WAV, FLAC, OGG and MP3 with soundfile and soxr, and whatever else transformers' `load_audio` reads
    where that is installed. Channels are averaged.

    Args:
        utterance: only `audio`, `start_s` and `end_s` are used.
        sampling_rate: of the result, in Hz.

    Returns:
        (samples,) float32, finite, at least one sample, not silent.

    Raises:
        AudioError: the file is missing, unreadable, cut short, empty, silent or not finite, or ends before the
            utterance does. The message names the file, the reason and what to do.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "tone.wav"
        >>> soundfile.write(path, 0.1 * np.sin(np.arange(44_100 * 2) / 20), 44_100)
        >>> load_waveform(Utterance("d", "0", "A", path, start_s=0.5, end_s=1.5)).shape
        (16000,)
        >>> load_waveform(Utterance("d", "0", "A", path, start_s=0.5, end_s=9.5))
        Traceback (most recent call last):
        mal_adapter.errors.AudioError: ...: the utterance goes from 0.50 s to 9.50 s, but the file lasts 2.00 s; ...
    """
    path = existing_sound(utterance.audio)
    try:
        stat = path.stat()
    except (OSError, ValueError) as error:
        raise AudioError(f"{path}: there is no such file; check the path") from error
    if path.is_dir():
        raise AudioError(f"{path}: this is a folder; give the sound files in it, in the order spoken")
    if not path.is_file():
        raise AudioError(f"{path}: this is not a file; give the sound file itself")
    if stat.st_size == 0:
        raise AudioError(f"{path}: the file is empty (0 bytes); record or copy it again")
    if utterance.start_s is None and utterance.end_s is None:
        waveform = _decode(path, sampling_rate)
    else:
        # The utterances of one long recording follow each other: decode it once.
        waveform = _decode_cached(path, sampling_rate, stat.st_mtime_ns, stat.st_size)
        waveform = _cut(waveform, utterance, sampling_rate)
    if waveform.size == 0:
        raise AudioError(f"{path}: the audio is empty (0 samples at {sampling_rate} Hz); record or cut it again")
    if not np.isfinite(waveform).all():
        raise AudioError(f"{path}: the audio contains values that are not finite (NaN or infinity); export it again")
    peak = float(np.abs(waveform).max())
    if peak <= SILENCE_PEAK:
        level = "all samples are zero" if peak == 0 else f"its peak is {20 * np.log10(peak):.0f} dBFS"
        raise AudioError(f"{path}: the audio is silent ({level}); check the recording or leave this utterance out")
    return waveform


def _cut(waveform: Waveform, utterance: Utterance, sampling_rate: int) -> Waveform:
    duration_s = waveform.size / sampling_rate
    start_s = utterance.start_s or 0.0
    end_s = duration_s if utterance.end_s is None else utterance.end_s
    if start_s >= duration_s or end_s > duration_s + TOLERANCE_S:
        raise AudioError(
            f"{utterance.audio}: the utterance goes from {start_s:.2f} s to {end_s:.2f} s, but the file lasts "
            f"{duration_s:.2f} s; check start_s and end_s, which are in seconds"
        )
    return waveform[round(start_s * sampling_rate) : round(end_s * sampling_rate)]


def _decode(path: Path, sampling_rate: int) -> Waveform:
    name = sound_path(path)
    try:
        info = soundfile.info(name)
    except RuntimeError as error:
        if not is_torchcodec_available():
            reason = str(error).rsplit(": ", maxsplit=1)[-1].rstrip(".")
            raise AudioError(
                f"{path}: this can not be read as audio ({reason}); convert it to WAV, FLAC, OGG or MP3"
            ) from error
        info = None
    if info is not None:
        found_s = info.frames / info.samplerate
        _check_complete(path, found_s / _wav_share(path), found_s)
    try:
        if info is None:
            # Absolute, since load_audio takes a string that is not an existing file for base64.
            waveform = load_audio(str(path.absolute()), sampling_rate=sampling_rate)
        else:
            samples, rate = soundfile.read(name, dtype="float32", always_2d=True)
            waveform = soxr.resample(samples.mean(axis=1), rate, sampling_rate)
    except (ImportError, MemoryError):  # not the file's fault
        raise
    except Exception as error:  # each library has its own exceptions, torchcodec's without a common base
        reason = str(error).strip().rstrip(".") or type(error).__name__
        raise AudioError(f"{path}: the audio can not be decoded ({reason}); convert or copy it again") from error
    if info is not None:
        _check_complete(path, info.frames / info.samplerate, len(waveform) / sampling_rate)
    return np.ascontiguousarray(waveform, dtype=np.float32)


@lru_cache(maxsize=2)
def _decode_cached(path: Path, sampling_rate: int, mtime_ns: int, size: int) -> Waveform:
    waveform = _decode(path, sampling_rate)
    waveform.flags.writeable = False
    return waveform


def sound_path(path: Path) -> str | bytes:
    """The path for soundfile, which would encode it itself and refuse a name that is not UTF-8."""
    return os.fsencode(path) if os.name == "posix" else str(path)


def _check_complete(path: Path, declared_s: float, found_s: float) -> None:
    """A file whose end is missing still decodes; half an utterance must not pass for the whole."""
    if declared_s - found_s > TOLERANCE_S + 0.01 * declared_s:
        raise AudioError(
            f"{path}: the file is cut short: {found_s:.2f} s of the {declared_s:.2f} s that its header declares; "
            "copy it again"
        )


def _wav_share(path: Path) -> float:
    """How much of the samples that a WAV file's header declares is there. 1 for other files, and for streams, whose
    header was written before their end.

    libsndfile corrects the header of a truncated WAV file silently, so it is read here.
    """
    with path.open("rb") as file:
        if file.read(4) != b"RIFF" or file.read(8)[4:] != b"WAVE":
            return 1.0
        while len(head := file.read(8)) == 8:
            name, size = struct.unpack("<4sI", head)
            if name != b"data":
                file.seek(size + size % 2, os.SEEK_CUR)
            elif size == 0 or size >= 0x7FFF_F000:  # ffmpeg writes 0xFFFFFFFF, espeak-ng 0x7FFFF000
                break
            else:
                return float(max(1, min(size, path.stat().st_size - file.tell())) / size)
    return 1.0
