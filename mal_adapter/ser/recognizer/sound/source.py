"""The bytes of a sound file, as libsndfile should see them."""

import io
import os
import stat
from typing import BinaryIO

__all__ = ["DamagedSoundError", "View", "open_regular_file", "read_at"]

_FARTHEST = 1 << 60  # a file system refuses offsets of 2**63
_TAG = 128  # bytes of an ID3v1 tag


class DamagedSoundError(Exception):
    """A file can't be read as sound, or its contents differ from its header. The message is the reason, without the
    name of the file; `load_waveform` turns it into an `AudioError`."""


def open_regular_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading, and no folder, pipe or device, which may never end.

    Raises:
        DamagedSoundError: There is no such file, or it can't be opened, is not a regular file, or is empty.
    """
    # Without O_NONBLOCK, opening a pipe waits for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if os.path.isdir(path):
            raise DamagedSoundError("this is a folder; give the sound files in it, in the order spoken")
        descriptor = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        if isinstance(error, DamagedSoundError):
            raise
        raise DamagedSoundError("there is no such file; check the path") from error
    except OSError as error:
        raise DamagedSoundError(f"the file can not be opened ({error.strerror or error}); check its rights") from error
    file = os.fdopen(descriptor, "rb")
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        file.close()
        raise DamagedSoundError("this is not a file; give the sound file itself, and save a stream to a file first")
    if status.st_size == 0:
        file.close()
        raise DamagedSoundError("the file is empty (0 bytes); record or copy it again")
    return file


def read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    """Up to `size` bytes from `offset`: fewer at the end of the file, none at an offset beyond all files."""
    if size <= 0 or not 0 <= offset < _FARTHEST:
        return b""
    file.seek(offset)
    return file.read(size)


class View(io.RawIOBase):
    """A file with a few bytes replaced and another size, for libsndfile.

    libsndfile calls these methods from C, where an exception would only be printed. So a failed read looks like the end
    of the file, and `error` has the reason.

    Args:
        file: Opened in binary mode.
        start: Where libsndfile sees the start of the file.
        end: Where it sees the end; may be beyond the real end.
        patches: (offset in `file`, bytes that replace those of the file), which do not overlap.
    """

    def __init__(self, file: BinaryIO, start: int, end: int, patches: tuple[tuple[int, bytes], ...] = ()) -> None:
        self._file = file
        self._start = start
        self._size = end - start
        self._readable_end = min(end, file.seek(0, os.SEEK_END))
        self._patches = patches
        self._position = 0
        self.error: Exception | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        start = self._start + self._position
        if self._readable_end < self._start + self._size - _TAG <= start:
            # mpg123 refuses a file if it can't read a tag at its end, even if `end` is beyond the real one.
            size = max(0, min(len(buffer), self._start + self._size - start))
            buffer[:size] = bytes(size)
            self._position += size
            return size
        size = min(len(buffer), self._readable_end - start)
        if size <= 0:
            return 0
        try:
            data = bytearray(read_at(self._file, start, size))
        except (OSError, ValueError) as error:
            self.error = error
            return 0
        for offset, replacement in self._patches:
            first, last = max(start, offset), min(start + len(data), offset + len(replacement))
            if first < last:
                data[first - start : last - start] = replacement[first - offset : last - offset]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def write(self, data: object) -> int:  # soundfile asks for the method and never calls it
        raise io.UnsupportedOperation("write")
