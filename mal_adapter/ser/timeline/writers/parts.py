"""What several formats need: lines of text, lanes without overlaps, names that occur once, and files."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from mal_adapter.ser.names import cleaned
from mal_adapter.ser.timeline.timeline import TimelineEntry
from mal_adapter.serialization.atomic import write_atomically

__all__ = ["NO_ANSWER", "clock", "in_order", "lanes", "named_once", "one_line", "percent", "save", "speaker", "ticks"]

#: Instead of an emotion, where a turn could not be answered.
NO_ANSWER = "no answer"
#: What XML can't hold at all, and a line of text should not: control characters, halves of characters, non-characters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")


def save(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file as a whole, UTF-8, and make its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content if isinstance(content, bytes) else content.encode("utf-8", "replace"))


def one_line(text: str | None) -> str:
    """A text in one line, without control characters; "" for None.

    Example:
        >>> one_line(" two\\nlines\\x07 ")
        'two lines'
    """
    return " ".join(_UNPRINTABLE.sub("", text or "").split())


def speaker(entry: TimelineEntry) -> str:
    """The name of who speaks, in one line and never empty."""
    return one_line(cleaned(entry.turn.speaker)) or "?"


def percent(probability: float | None) -> str:
    """A probability for people to read: "75 %"."""
    return "" if probability is None else f"{100 * probability:.0f} %"


def in_order(entries: Iterable[TimelineEntry]) -> list[TimelineEntry]:
    """The entries in order of start; those that start together in the given order."""
    return sorted(entries, key=lambda entry: entry.turn.start_s)


def ticks(entry: TimelineEntry, per_s: int) -> tuple[int, int]:
    """(Start, end) of a turn in whole parts of a second. A turn is never shorter than one part.

    Args:
        entry: The turn's.
        per_s: Parts of a second; 1000 for milliseconds.
    """
    start, end = round(entry.turn.start_s * per_s), round(entry.turn.end_s * per_s)
    return start, max(end, start + 1)


def clock(ms: int, separator: str) -> str:
    """Milliseconds as subtitles write them.

    Example:
        >>> clock(3_723_004, ".")
        '01:02:03.004'
    """
    return f"{ms // 3_600_000:02d}:{ms // 60_000 % 60:02d}:{ms // 1000 % 60:02d}{separator}{ms % 1000:03d}"


def lanes(entries: Iterable[TimelineEntry], per_s: int) -> dict[tuple[str, int], list[TimelineEntry]]:
    """(Speaker, number from 1) -> turns that do not overlap each other. Speakers who overlap only with others have one
    lane each; whoever overlaps with himself has more.

    Args:
        entries: Of all speakers.
        per_s: The parts of a second that the format knows, in which turns must not overlap.
    """
    found: dict[tuple[str, int], list[TimelineEntry]] = {}
    ends: dict[tuple[str, int], int] = {}
    for entry in in_order(entries):
        start, end = ticks(entry, per_s)
        number = 1
        while ends.get((speaker(entry), number), 0) > start:
            number += 1
        lane = (speaker(entry), number)
        found.setdefault(lane, []).append(entry)
        ends[lane] = end
    return found


def named_once(names: Sequence[str], taken: set[str]) -> list[str]:
    """The names, with a number behind those that are taken already. What is mutated: the result is added to `taken`.

    Example:
        >>> named_once(["Ann", "Ann emotion"], {"Ann"})
        ['Ann (2)', 'Ann emotion']
    """
    result = []
    for name in names:
        number, free = 1, name
        while free in taken:
            number += 1
            free = f"{name} ({number})"
        taken.add(free)
        result.append(free)
    return result
