"""What was measured of a file, kept while the file stays as it is."""

import os
import time
from collections.abc import Callable
from typing import BinaryIO, Generic, TypeVar

__all__ = ["Kept"]

_SETTLED_S = 2.0

Measured = TypeVar("Measured")


class Kept(Generic[Measured]):
    """The results of measurements of the files that were measured last.

    Args:
        most: For how many files.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._results: dict[tuple[int, ...], Measured] = {}

    def of(self, file: BinaryIO, measure: Callable[[], Measured]) -> Measured:
        """The result for a file: one that is kept, or a new one."""
        status = os.fstat(file.fileno())
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if key in self._results:
            return self._results[key]
        result = measure()
        # The clocks of file systems are coarse: a file may change twice within one tick.
        if time.time() - status.st_mtime > _SETTLED_S:
            while len(self._results) >= self._most:
                self._results.pop(next(iter(self._results), key), None)
            self._results[key] = result
        return result
