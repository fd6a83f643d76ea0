"""Any sound file, opened by the reader of its format."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, Protocol

from mal_adapter.ser.recognizer.sound.ffmpeg import FfmpegSound
from mal_adapter.ser.recognizer.sound.layout import layout_of
from mal_adapter.ser.recognizer.sound.reader import Block, Sound, reason_of
from mal_adapter.ser.recognizer.sound.source import DamagedSoundError, open_regular_file

__all__ = ["OpenSound", "open_sound"]


class OpenSound(Protocol):
    """The samples of an opened file, whatever reads them.

    Attributes:
        sampling_rate: In Hz.
        channels: Number of channels.
        frames: Samples per channel.
        lossy: Whether the format keeps a constant only roughly.
    """

    sampling_rate: int
    channels: int
    frames: int
    lossy: bool

    @property
    def duration_s(self) -> float: ...

    def blocks(self, first: int, last: int) -> Iterator[Block]: ...

    def close(self) -> None: ...


@contextmanager
def open_sound(path: str | os.PathLike[str], longest_s: float | None = None) -> Iterator[OpenSound]:
    """Open a sound file.

    Args:
        path: The file.
        longest_s: Give up on a file that is longer, where its length is known only from decoding it.

    Raises:
        UnknownFormatError: The file is of no format that can be read here.
        DamagedSoundError: It can't be opened, has less or more samples than it declares, or changed meanwhile.
        AudioTooLongError: It is longer than `longest_s`.
    """
    file = open_regular_file(path)
    try:
        before = os.fstat(file.fileno())
        sound = _open(file, longest_s)
        try:
            yield sound
        finally:
            after = os.fstat(file.fileno())
            sound.close()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise DamagedSoundError("the file changed while it was read; wait until it is complete")
    finally:
        file.close()


def _open(file: BinaryIO, longest_s: float | None) -> OpenSound:
    try:
        layout = layout_of(file)
    except OSError as error:
        raise DamagedSoundError(f"the file can not be read ({reason_of(error)}); copy it again") from error
    return FfmpegSound(file, longest_s) if layout is None else Sound(file, layout)
