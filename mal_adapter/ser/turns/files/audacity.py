"""Audacity's label tracks: start, end and label, separated by tabs.

A label is who speaks, or what is said: short labels are names, and if one label is a sentence, all are texts. A label
without length is a mark of an instant, and no turn. Lines that start with a backslash are frequencies.
"""

import re

from mal_adapter.errors import TurnError
from mal_adapter.ser.turns.files.span import Span, Tier, seconds
from mal_adapter.ser.turns.files.text import split_names
from mal_adapter.serialization.text import shown

__all__ = ["looks_like_labels", "read_labels"]

_LINE = re.compile(r"\s*[+-]?\d+(?:[.,]\d+)?\t[+-]?\d+(?:[.,]\d+)?(?:\t.*)?")
_NAME = re.compile(r"[^.!?;,\n]{1,40}")
_MAX_WORDS = 3


def looks_like_labels(text: str) -> bool:
    """Whether the first line with content has two numbers, separated by a tab."""
    return _LINE.fullmatch(text.lstrip("\n").split("\n", 1)[0]) is not None


def read_labels(text: str) -> list[Tier]:
    """The labels of a track, and those of several tracks in one file."""
    rows: list[tuple[str, float, float, str]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.startswith("\\"):
            continue
        fields, where = line.split("\t", 2), f"line {number}"
        if len(fields) < 2:
            raise TurnError(f"{where}: expected start, end and label, separated by tabs, got {shown(line)}")
        label = fields[2] if len(fields) == 3 else ""
        rows.append((where, seconds(fields[0], where, "start"), seconds(fields[1], where, "end"), label))
    named = split_names([label for *_, label in rows])
    rest = [text for name, text in named if not name]
    are_names = all(not text or _is_name(text) for text in rest)
    spans = []
    for (where, start_s, end_s, _), (name, words) in zip(rows, named, strict=True):
        span = Span(where, start_s, end_s, name, words)
        if span.is_point or (span.text and span.is_silence):
            continue
        if not name and are_names:
            span = Span(where, start_s, end_s, words)
        spans.append(span)
    return [Tier("", spans, unit="labels")]


def _is_name(label: str) -> bool:
    return _NAME.fullmatch(label) is not None and len(label.split()) <= _MAX_WORDS
