"""File names, the lock and the errors of `FolderStore`."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote_to_bytes

from mal_adapter.errors import SessionError, StoreError
from mal_adapter.stores.base import encode_session_id

__all__ = ["SUFFIX", "explained", "file_lock", "file_name", "session_id_of"]

SUFFIX = ".safetensors"
LONGEST = 255  # bytes of one name on ext4, XFS, APFS and NTFS

# No upper case: "Call" and "call" would be one file on macOS and Windows, and the second dialogue would read the first
# one's memory. No letter beyond ASCII: macOS may store é in another normal form than it was given.
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-_.")


def file_name(session_id: str) -> str:
    """The name of a session's file: its id, percent-encoded so that it is one visible file of this folder and
    differs from the names of all other ids.

    Raises:
        SessionError: The id is not a non-empty Unicode string, or too long for a file name.

    Example:
        >>> file_name("room-7/Anna")
        'room-7%2F%41nna.safetensors'
        >>> file_name("..")
        '%2E..safetensors'
    """
    name = "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in encode_session_id(session_id))
    if name.startswith("."):  # hidden files are temporaries and the lock
        name = "%2E" + name[1:]
    name += SUFFIX
    if len(name) > LONGEST:
        raise SessionError(
            f"session id {session_id[:32]!r}… of {len(session_id)} characters makes a file name of {len(name)} bytes, "
            f"and files allow {LONGEST}; letters other than a-z take 3 bytes or more. Use a shorter id, or its hash"
        )
    return name


def session_id_of(name: str) -> str | None:
    """The inverse of `file_name`; None for other files.

    Example:
        >>> session_id_of("room-7%2F%41nna.safetensors")
        'room-7/Anna'
        >>> session_id_of("Notes.safetensors") is None
        True
    """
    try:
        session_id = unquote_to_bytes(name.removesuffix(SUFFIX)).decode()
        # a name in which other letters are encoded decodes too, but it is not a session's
        return session_id if file_name(session_id) == name else None
    except (UnicodeError, SessionError):
        return None


@contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock on `path`, which is created if it does not exist and never deleted. The system releases
    it when its process ends.

    Raises:
        BlockingIOError: Another process or thread holds it, and `wait` is False.
        OSError: The file can't be opened or locked.
    """
    import fcntl  # missing on Windows, where this module is imported too

    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            # Closing is not enough: a process forked meanwhile has a copy of the handle and would hold the lock.
            fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of the quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EACCES: "check its owner and permissions",
    errno.EPERM: "check its owner and permissions",
    errno.EROFS: "mount the file system for writing",
    errno.ENOENT: "the folder is gone; mount it again, or open the store again to create it",
    errno.ENOTDIR: "it is a file and not a folder",
    errno.EEXIST: "it is a file and not a folder",
    errno.EMFILE: "close files, or raise the limit on open ones (ulimit -n)",
}


@contextmanager
def explained(action: str, path: Path) -> Iterator[None]:
    """Turn an OSError in the block into a `StoreError` with the action, the path, the reason and a remedy."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "check the disk and the mount")
        raise StoreError(f"can't {action} {path}: {error.strerror or error}; {advice}") from error
