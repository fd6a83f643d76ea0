"""Atomic writes: a file is written as a whole or not at all."""

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

__all__ = ["TEMPORARY_PREFIX", "folder_problem", "remove_leftovers", "write_atomically"]

# This prefix marks the temporary files that a killed process may leave. They don't contain the target's name, which may
# already have the greatest length that the file system allows.
TEMPORARY_PREFIX = ".mal_adapter-"
LEFTOVER_AFTER_S = 3600.0  # no write takes an hour, so the writer of an older temporary file has ended

# A process's umask can only be read by setting it. It is read once, at import, because of other threads.
_UMASK = os.umask(0)
os.umask(_UMASK)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path`. Readers see the old file or the new one, never a part; so they do after a crash."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY_PREFIX, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp's 0o600 would hide the file from the user's group
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the folder itself may be gone; the first error is more useful
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def folder_problem(folder: Path) -> str | None:
    """The reason why a folder can't be written to, or can't be created; None if it can. Nothing is created.

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> _ = path.write_text("a file")
        >>> folder_problem(path)
        '...notes.txt is a file, not a folder; give another one'
        >>> folder_problem(path.parent / "new" / "folder") is None
        True
    """
    for place in (folder, *folder.absolute().parents):
        try:
            if not place.exists():
                if place.is_symlink():
                    return f"{place} is a broken link; give another folder"
                continue
            if not place.is_dir():
                return f"{place} is a file, not a folder; give another one"
        except (OSError, ValueError) as error:  # a part of the path is a file, or the name is too long
            return f"{place} can't be a folder: {getattr(error, 'strerror', None) or error}; give another one"
        if not os.access(place, os.W_OK | os.X_OK):
            return f"{place} is not writable; give another folder, or change its permissions"
        return None
    return f"{folder} is on a disk that does not exist; give another folder"


def remove_leftovers(folder: Path, prefix: str = TEMPORARY_PREFIX, *, older_than_s: float = LEFTOVER_AFTER_S) -> None:
    """Delete the temporary files, or folders, that killed writers left in `folder`."""
    for path in folder.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # another process may be faster
            if time.time() - path.stat().st_mtime < older_than_s:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _sync_folder(folder: Path) -> None:
    """Sync a folder, so that a rename in it survives a power cut. Windows can't open a folder, and some network file
    systems can't sync one. The new file is in place already, so errors are ignored."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
