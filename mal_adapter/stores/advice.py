"""Errors of the operating system as `StoreError`, with what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mal_adapter.errors import StoreError

__all__ = ["explained"]

_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of the quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EACCES: "check its owner and permissions",
    errno.EPERM: "check its owner and permissions",
    errno.EROFS: "mount the file system for writing",
    errno.ENOENT: "the folder is gone; mount it again, or open the store anew to create it",
    errno.ENOTDIR: "a file is where a folder should be",
    errno.EEXIST: "a file is where a folder should be",
    errno.EMFILE: "close files, or raise the limit on open ones (ulimit -n)",
}


@contextmanager
def explained(action: str, path: Path) -> Iterator[None]:
    """Turn an OSError inside into a `StoreError` that says what could not be done with `path`, why, and what helps."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "check the disk and the mount")
        raise StoreError(f"can't {action} {path}: {error.strerror or error}; {advice}") from error
