"""What browsers and phones record, decoded by FFmpeg through PyAV: WebM and Matroska, MP4, M4A and 3GP, AAC, AMR, WMA.

The headers of these formats give times roughly or not at all: WebM counts milliseconds, a browser's file has no length,
and raw AAC has no times. So a file is decoded once to count its samples, at some hundred times the speed of speech. The
counts are kept, so each part costs what the part costs.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, cast

import numpy as np

from mal_adapter.errors import AudioTooLongError
from mal_adapter.ser.recognizer.sound.kept import Kept
from mal_adapter.ser.recognizer.sound.layout import cut_short
from mal_adapter.ser.recognizer.sound.reader import BLOCK, TOLERANCE_S, Block, UnknownFormatError
from mal_adapter.ser.recognizer.sound.source import DamagedSoundError

if TYPE_CHECKING:
    from av import AudioFrame, AudioStream
    from av.container import InputContainer

__all__ = ["FfmpegSound"]

#: FFmpeg's names of the formats. It knows many more, of which some open further files.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,asf,aac,amr"
#: Times so much later than the samples before them are a gap, in seconds; silence fills it.
_GAP_S = 0.1
#: A decoder starts at least so long before a part, to give the same samples as from the start, in seconds.
_PREROLL_S = 1.0
#: How far apart the places are from which a decoder can start, in seconds.
_STEP_S = 1.0


class _Contents(NamedTuple):
    """What a file has.

    Attributes:
        sampling_rate: In Hz.
        channels: Number of channels.
        lossy: Whether the codec keeps a constant only roughly.
        start_s: What FFmpeg's times count from, in seconds.
        frames: Samples per channel.
        positions: Numbers of samples, one a second, with which frames start.
        times: FFmpeg's times of these frames.
    """

    sampling_rate: int
    channels: int
    lossy: bool
    start_s: float
    frames: int
    positions: "array[int]"
    times: "array[int]"


_kept: Kept[_Contents] = Kept(512)  # an hour takes 58 kilobytes, and seconds to measure


class FfmpegSound:
    """The samples of the main audio track of a file.

    A track that starts after the file's other tracks has silence before it, and a gap has silence in it, so that times
    are those of a player.

    Args:
        file: Opened in binary mode.
        longest_s: Give up on a file that is longer.

    Raises:
        UnknownFormatError: FFmpeg does not know the format, or PyAV is not installed.
        DamagedSoundError: The file can't be decoded, is cut short, or has no audio track.
        AudioTooLongError: It is longer than `longest_s`.
    """

    def __init__(self, file: BinaryIO, longest_s: float | None = None) -> None:
        if find_spec("av") is None:
            raise UnknownFormatError(
                "its format is not known; pip install 'mal-adapter[recordings]' to read WebM, MP4, M4A, 3GP, AAC, AMR "
                "and WMA"
            )
        self._file = file
        self._contents = _kept.of(file, partial(_measure, file, longest_s))
        self.sampling_rate = self._contents.sampling_rate
        self.channels = self._contents.channels
        self.frames = self._contents.frames
        self.lossy = self._contents.lossy
        if longest_s is not None and self.duration_s > longest_s:
            raise AudioTooLongError(
                f"the audio lasts {self.duration_s:.2f} s, more than the limit of {longest_s:.2f} s"
            )

    @property
    def duration_s(self) -> float:
        return self.frames / self.sampling_rate

    def close(self) -> None:
        """Do nothing: a decoder is open only while blocks are read."""

    def blocks(self, first: int, last: int) -> Iterator[Block]:
        """Decode the frames `first` to `last` in blocks, of which the last may be shorter.

        Raises:
            DamagedSoundError: The frames can not be decoded.
        """
        pieces: list[Block] = []
        size, position = 0, first
        for start, samples in self._decode(first):
            piece = samples[max(0, first - start) : max(0, last - start)]
            if len(piece):
                pieces.append(piece)
                size += len(piece)
                position += len(piece)
            if size >= BLOCK // self.channels:
                yield np.concatenate(pieces)
                pieces, size = [], 0
            if position >= last:
                break
        if pieces:
            yield np.concatenate(pieces)
        if position < last:
            raise DamagedSoundError(
                f"the file is damaged: {position / self.sampling_rate:.2f} s of {self.duration_s:.2f} s can be "
                "decoded; copy it again"
            )

    def _decode(self, first: int) -> Iterator[tuple[int, Block]]:
        """All samples from `first` or before it, each piece with the number of its first sample."""
        before = first - round(_PREROLL_S * self.sampling_rate)
        number = bisect_right(self._contents.positions, before) - 1
        found = False
        if number > 0:
            for piece in self._decode_from(number, first):
                found = True
                yield piece
        if not found:
            yield from self._decode_from(0, first)

    def _decode_from(self, number: int, first: int) -> Iterator[tuple[int, Block]]:
        """All samples from one of the places or soon after it; nothing if FFmpeg does not find it again."""
        positions, times = self._contents.positions, self._contents.times
        last = bisect_right(positions, first)
        places = dict(zip(times[number:last], positions[number:last], strict=True))
        with _opened(self._file) as (container, stream):
            clock = None if number > 0 else _Clock(self.sampling_rate, self._contents.start_s)
            if number > 0:
                container.seek(next(iter(places)), stream=stream)
            for frame in _frames(container, stream, _Ends()):
                if clock is None:
                    if frame.pts not in places:
                        if frame.pts is None or frame.pts > max(places):
                            return
                        continue
                    clock = _Clock(self.sampling_rate, self._contents.start_s, places[frame.pts])
                before = clock.position
                start = clock.place(frame)
                for silent in range(before, start, BLOCK):
                    yield silent, np.zeros((min(BLOCK, start - silent), self.channels), dtype=np.float32)
                yield start, _samples(frame)


class _Clock:
    """Numbers the samples of frames that follow each other."""

    def __init__(self, sampling_rate: int, start_s: float, position: int = 0) -> None:
        self._rate = sampling_rate
        self._start_s = start_s
        self.position = position

    def place(self, frame: "AudioFrame") -> int:
        """The number of the frame's first sample."""
        if frame.sample_rate != self._rate:
            raise DamagedSoundError("the sampling rate changes within the file; convert it to WAV")
        if frame.time is not None and frame.time - self._start_s > self.position / self._rate + _GAP_S:
            self.position = round((frame.time - self._start_s) * self._rate)
        start = self.position
        self.position += frame.samples
        return start


class _Ends:
    """How far the tracks of a file reach, by FFmpeg's times in seconds."""

    def __init__(self) -> None:
        self.last_s = 0.0


def _measure(file: BinaryIO, longest_s: float | None) -> _Contents:
    """Decode a whole file, to count its samples."""
    with _opened(file) as (container, stream):
        clock: _Clock | None = None
        positions, times = array("q"), array("q")
        ends = _Ends()
        first: AudioFrame | None = None
        start_s, offset, size = 0.0, 0, 0
        for frame in _frames(container, stream, ends):
            if clock is None:
                first, start_s = frame, frame.time or 0.0
                if len(container.streams) > 1 and container.start_time is not None:
                    start_s = min(start_s, container.start_time / 1e6)
                clock = _Clock(frame.sample_rate, start_s)
            position = clock.place(frame)
            offset = position if first is frame else offset
            size = frame.samples
            if frame.pts is not None and (not times or position - positions[-1] >= _STEP_S * frame.sample_rate):
                positions.append(position)
                times.append(frame.pts)
            if longest_s is not None and clock.position > longest_s * frame.sample_rate:
                raise AudioTooLongError(f"the audio lasts more than the limit of {longest_s:.2f} s")
        if clock is None or first is None:
            raise DamagedSoundError("the audio is empty (0 samples); record or cut it again")
        rate, frames = first.sample_rate, clock.position
        declared_s, found_s = _declared(container, stream), (frames - offset) / rate
        if "mov" not in container.format.name:
            found_s = max(ends.last_s, start_s + frames / rate)
        if declared_s is not None and declared_s - found_s > TOLERANCE_S:
            raise DamagedSoundError(cut_short(found_s, declared_s))
        if declared_s is not None and "mov" in container.format.name:
            # The last packet is filled up, and only the header says how far.
            filled = frames - offset - round(declared_s * rate)
            frames -= filled if 0 < filled < 2 * size else 0
        lossy = not stream.codec_context.codec.lossless
        return _Contents(rate, first.layout.nb_channels, lossy, start_s, frames, positions, times)


def _declared(container: "InputContainer", stream: "AudioStream") -> float | None:
    """The length by the header in seconds, of the track or of the whole file; None if it is not given or a guess."""
    if "mov" in container.format.name:
        return None if stream.duration is None else float(stream.duration * (stream.time_base or 0))
    if container.format.name in ("matroska,webm", "asf") and container.duration is not None:
        return container.duration / 1e6
    return None


@contextmanager
def _opened(file: BinaryIO) -> Iterator[tuple["InputContainer", "AudioStream"]]:
    """FFmpeg's view of a file, and its main audio track."""
    import av

    file.seek(0)
    try:
        container = av.open(file, "r", container_options={"format_whitelist": _FORMATS})
    except (av.FFmpegError, ValueError) as error:
        raise UnknownFormatError(f"its format is not known, or it is cut short: {_reason(error)}") from error
    with container:
        stream = cast("AudioStream | None", container.streams.best("audio"))
        if stream is None:
            raise DamagedSoundError("the file has no audio track; record or export it with sound")
        if stream.codec_context is None:
            raise UnknownFormatError("FFmpeg has no decoder for its audio track")
        yield container, stream


def _frames(container: "InputContainer", stream: "AudioStream", ends: _Ends) -> Iterator["AudioFrame"]:
    """Decode a track from where its container is. What can't be decoded at the very end is left out: whether
    something is missing there is for the declared length to say.

    Raises:
        DamagedSoundError: Something before the end can't be decoded.
    """
    import av

    failed: Exception | None = None
    time_s = 0.0
    try:
        for packet in container.demux():
            if packet.stream.index != stream.index:
                if packet.pts is not None and packet.time_base is not None:
                    ends.last_s = max(ends.last_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                continue
            if failed is not None and packet.size:
                raise DamagedSoundError(
                    f"the file is damaged at about {time_s:.2f} s: {_reason(failed)}; copy it again"
                ) from failed
            try:
                frames = cast("list[AudioFrame]", packet.decode())
            except av.FFmpegError as error:
                failed, frames = error, []
            if packet.is_corrupt:  # less of it than there should be
                failed, frames = EOFError("a part is missing"), []
            for frame in frames:
                time_s = time_s if frame.time is None else frame.time
                yield frame
    except av.FFmpegError as error:
        raise DamagedSoundError(
            f"the file is damaged at about {time_s:.2f} s: {_reason(error)}; copy it again"
        ) from error


def _samples(frame: "AudioFrame") -> Block:
    """(samples, channels) float32, from -1 to 1."""
    values = frame.to_ndarray()
    values = values.T if frame.format.is_planar else values.reshape(frame.samples, -1)
    if values.dtype == np.uint8:
        return (values.astype(np.float32) - 128) / np.float32(128)
    if np.issubdtype(values.dtype, np.integer):
        return (values / 2.0 ** (8 * values.dtype.itemsize - 1)).astype(np.float32)
    return np.ascontiguousarray(values, dtype=np.float32)


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).rstrip(".")
