"""JSON Lines: one object for the recording, then one per turn, with all that is known. See `Timeline.to_records`."""

import json
import os
from pathlib import Path

from mal_adapter.errors import TurnError
from mal_adapter.ser.timeline.timeline import Timeline
from mal_adapter.ser.timeline.writers.parts import save
from mal_adapter.serialization.strict_json import unique_keys

__all__ = ["read_timeline", "write_jsonl"]


def write_jsonl(timeline: Timeline, path: str | os.PathLike[str]) -> None:
    """Write a timeline for programs. `read_timeline` reads it.

    Example:
        >>> import tempfile
        >>> timeline = Timeline("call.wav", 8.0, (), ("sad", "happy"), "call", "How does the speaker feel?")
        >>> path = Path(tempfile.mkdtemp()) / "call.jsonl"
        >>> write_jsonl(timeline, path)
        >>> read_timeline(path) == timeline
        True
    """
    save(path, b"".join(_line(record) for record in timeline.to_records()))


def read_timeline(path: str | os.PathLike[str]) -> Timeline:
    """Read a timeline that `write_jsonl` wrote.

    Raises:
        TurnError: The file can't be read or is no timeline. The message names the file and the line.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise TurnError(f"{path}: the timeline can't be read: {error.strerror or error}; check the path") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                record = json.loads(line.decode(), object_pairs_hook=unique_keys)
            except (RecursionError, ValueError) as error:
                raise TurnError(f"{path}, line {number}: this is no JSON object: {error}") from error
            if not isinstance(record, dict):
                raise TurnError(f"{path}, line {number}: expected a JSON object, got {line[:40]!r}")
            records.append(record)
    try:
        return Timeline.from_records(records)
    except TurnError as error:
        raise TurnError(f"{path}: {error}") from error


def _line(record: dict[str, object]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a path that is not UTF-8 has lone surrogates, which JSON can escape
        return json.dumps(record).encode() + b"\n"
