"""The format and the length of a sound file, read from all of its headers before anything is decoded."""

import os
from typing import BinaryIO, NamedTuple

from mal_adapter.ser.recognizer.sound.chunks import find_sample_bytes
from mal_adapter.ser.recognizer.sound.flac import measure_flac
from mal_adapter.ser.recognizer.sound.kept import Kept
from mal_adapter.ser.recognizer.sound.mpeg import INDEXED, is_mpeg, measure_mpeg
from mal_adapter.ser.recognizer.sound.ogg import check_ogg
from mal_adapter.ser.recognizer.sound.source import DamagedSoundError, read_at
from mal_adapter.ser.recognizer.sound.tags import end_without_tags, start_without_tags

__all__ = ["UNKNOWN_END", "Layout", "cut_short", "layout_of"]

UNKNOWN_END = 1 << 50  # makes libsndfile read to the real end


class Layout(NamedTuple):
    """The bytes that libsndfile should see, and the samples in them.

    Attributes:
        formats: libsndfile's names of the formats that fit.
        start: Offset of the first byte to see.
        end: Offset after the last byte to see; may be beyond the real end.
        patches: (offset, bytes that replace those of the file).
        frames: Number of frames of samples; None if libsndfile's own count is right.
        declared_frames: Number of frames by the header; None if it gives none, or has been checked.
        present: Bytes of samples in the file; 0 if the format does not give it.
        declared: Bytes of samples by the header.
        beyond: Bytes after the samples that seem to be samples too.
        places: (frame, offset): a decoder that starts at the offset gives the samples from this frame on, of which the
            first are wrong. For formats in which libsndfile would read the whole file to find a frame.
    """

    formats: tuple[str, ...]
    start: int
    end: int
    patches: tuple[tuple[int, bytes], ...] = ()
    frames: int | None = None
    declared_frames: int | None = None
    present: int = 0
    declared: int = 0
    beyond: int = 0
    places: tuple[tuple[int, int], ...] = ()


_kept: Kept[Layout | None] = Kept(32)  # an MP3 of an hour takes half a megabyte


def layout_of(file: BinaryIO) -> Layout | None:
    """Read the headers of a file; None for formats that are not known here.

    The result is kept: every utterance of a long recording needs it, and the length of an MP3 is known only after a
    pass over all frames.

    Raises:
        DamagedSoundError: Some of the file is missing.
    """
    return _kept.of(file, lambda: _read_layout(file, os.fstat(file.fileno()).st_size))


def _read_layout(file: BinaryIO, size: int) -> Layout | None:
    start = start_without_tags(file, size)
    magic = read_at(file, start, 4)
    if magic == b"fLaC":
        flac = measure_flac(file, start, end_without_tags(file, start, size))
        return Layout(("FLAC",), start, flac.end, flac.patches, flac.found, flac.declared or None)
    if magic == b"OggS":
        check_ogg(file, start, size)
        return Layout(("OGG",), start, size)
    if start == 0 and (samples := find_sample_bytes(file, size)) is not None:
        return Layout(
            ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "NIST"),
            0,
            size if samples.end is None else samples.end,
            samples.patches,
            declared_frames=samples.frames,
            present=samples.present,
            declared=samples.declared,
            beyond=samples.beyond,
        )
    if is_mpeg(file, start, size):
        return _of_mpeg(file, start, size)
    return None


def _of_mpeg(file: BinaryIO, start: int, size: int) -> Layout:
    mpeg = measure_mpeg(file, start, size)
    step = INDEXED * mpeg.samples_per_frame
    places = tuple((number * step - mpeg.skipped, offset) for number, offset in enumerate(mpeg.starts) if number)
    if mpeg.declared is None:
        frames = mpeg.frames * mpeg.samples_per_frame
        return Layout(("MP3", "MPEG"), start, UNKNOWN_END, frames=frames, places=places)
    if mpeg.frames < mpeg.declared:
        found_s, declared_s = (n * mpeg.samples_per_frame / mpeg.sampling_rate for n in (mpeg.frames, mpeg.declared))
        raise DamagedSoundError(cut_short(found_s, declared_s))
    # There are more frames than declared where files were joined, or the header was written too early.
    return Layout(("MP3", "MPEG"), start, size, mpeg.patches, places=places)


def cut_short(found_s: float, declared_s: float) -> str:
    """The message about a file that is cut short, with both durations."""
    return f"the file is cut short: {found_s:.2f} s of the {declared_s:.2f} s that its header declares; copy it again"
