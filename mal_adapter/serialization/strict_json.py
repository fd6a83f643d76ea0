"""Strict reading: regular files only, and JSON without ambiguities; anything else is a `ValueError`."""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["open_regular", "parse_json", "unique_keys"]


def open_regular(path: Path) -> tuple[BinaryIO, int]:
    """Open a regular file and return it with its size in bytes.

    Raises:
        ValueError: `path` is a directory, pipe or device.
        OSError: `path` is missing or can't be opened.
    """
    # Without O_NONBLOCK the opening of a pipe waits for a writer.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    file = None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path.name} is not a regular file")
        file = os.fdopen(handle, "rb")
    finally:
        if file is None:
            os.close(handle)
    return file, status.st_size


def parse_json(data: bytes) -> Any:
    """Parse JSON in UTF-8 that has the same meaning for every reader.

    Raises:
        ValueError: `data` is not JSON, repeats a key, nests too deeply, or has NaN, infinities or lone surrogates.

    Example:
        >>> parse_json(b'{"layer_idx": 16}')
        {'layer_idx': 16}
        >>> parse_json(b'{"layer_idx": 16, "layer_idx": 17}')
        Traceback (most recent call last):
        ...
        ValueError: the key 'layer_idx' is given twice
    """
    try:
        content = json.loads(data.decode(), object_pairs_hook=unique_keys, parse_constant=_finite, parse_float=_finite)
        json.dumps(content, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return content


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The `object_pairs_hook` of `json.loads` that refuses a repeated key.

    Raises:
        ValueError: A key is given twice.

    Example:
        >>> unique_keys([("layer_idx", 16), ("task", None)])
        {'layer_idx': 16, 'task': None}
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value
