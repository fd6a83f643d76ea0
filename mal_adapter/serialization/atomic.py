"""Files that are there as a whole or not at all."""

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

__all__ = ["TEMPORARY_PREFIX", "folder_problem", "remove_leftovers", "write_atomically"]

# What a killed process leaves behind is known by it; the file's own name has no part, for it may be as long as the
# file system allows.
TEMPORARY_PREFIX = ".mal_adapter-"
LEFTOVER_AFTER_S = 3600.0  # no write takes an hour, so whoever wrote such a temporary is dead

# A process's umask can only be read by setting it; once, at import, keeps other threads out of the gap.
_UMASK = os.umask(0)
os.umask(_UMASK)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a crash, sees the old file or the new one and nothing between."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY_PREFIX, suffix=".tmp")
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


def folder_problem(folder: Path) -> str | None:
    """Why a folder can not be written to, or made where it does not exist; None if it can. Nothing is made.

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> _ = path.write_text("a file")
        >>> folder_problem(path)
        '...notes.txt is a file and no folder; give another one'
        >>> folder_problem(path.parent / "new" / "folder") is None
        True
    """
    for place in (folder, *folder.absolute().parents):
        try:
            if not place.exists():
                if place.is_symlink():
                    return f"{place} is a link to nowhere; give another folder"
                continue
            if not place.is_dir():
                return f"{place} is a file and no folder; give another one"
        except (OSError, ValueError) as error:  # a part of the path is a file, or the name is too long
            return f"{place} can not be a folder: {getattr(error, 'strerror', None) or error}; give another one"
        if not os.access(place, os.W_OK | os.X_OK):
            return f"{place} can not be written to; give another folder, or change its permissions"
        return None
    return f"{folder} is on no disk that exists; give another folder"


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
    """Have a rename in `folder` survive a power cut, where the system can: Windows can't open a folder, and some
    network file systems can't sync one. The new file is in place already, so a failure here is none of the write."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
