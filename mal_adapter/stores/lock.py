"""A lock on a file: between processes, and between threads since each opens the file anew."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["file_lock"]


@contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock on `path`, which is created if need be and never deleted; the system frees a dead holder's lock.

    Raises:
        BlockingIOError: Someone else holds it, and `wait` is False.
        OSError: The file can't be opened or locked.
    """
    import fcntl  # not on Windows, where this module is imported all the same

    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            # Closing alone would not do: a process forked meanwhile has a copy of the handle and would keep the lock.
            fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)
