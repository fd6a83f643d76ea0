"""Files that are there as a whole or not at all."""

import contextlib
import os
import tempfile
from pathlib import Path

__all__ = ["TEMPORARY_PREFIX", "TEMPORARY_SUFFIX", "write_atomically"]

# What a killed process leaves behind is known by these; the file's own name has no part, for it may be as long as the
# file system allows.
TEMPORARY_PREFIX = ".mal_adapter-"
TEMPORARY_SUFFIX = ".tmp"

# A process's umask can only be read by setting it; once, at import, keeps other threads out of the gap.
_UMASK = os.umask(0)
os.umask(_UMASK)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a crash, sees the old file or the new one and nothing between."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY_PREFIX, suffix=TEMPORARY_SUFFIX)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp's 0o600 would hide the file from the user's group
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the folder itself may be gone; the first error tells more
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Have a rename in `folder` survive a power cut, where the system can: Windows can't open a folder, and some
    network file systems can't sync one. The new file is in place already, so a failure here is none of the write."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
