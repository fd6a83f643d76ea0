"""Tables: CSV with a header, separated by commas, semicolons or tabs.

Times are in seconds unless the header says milliseconds. The .tsv files of Whisper do not: their columns are start, end
and text, and all times are whole milliseconds.
"""

import csv
import io
import re

from mal_adapter.errors import TurnError
from mal_adapter.ser.turns.files.columns import EXPECTED_COLUMNS, Columns
from mal_adapter.ser.turns.files.span import Tier
from mal_adapter.serialization.text import shown

__all__ = ["looks_like_table", "read_table"]

#: Whisper's .tsv: no quotes, one line per row, and times of 100 ms or more, since nobody's turns last for minutes each.
_WHISPER = re.compile(r"start\tend\ttext\n(?:\d+\t\d{3,}\t[^\n\t]*(?:\n|\Z))+\s*")
_SEPARATORS = (",", ";", "\t", "|")


def looks_like_table(text: str) -> bool:
    """Whether the first line is a header that names times."""
    return _best(text)[1].complete


def read_table(text: str) -> list[Tier]:
    """The rows of a table: one tier, or one per recording if a column names several."""
    separator, columns = _best(text)
    body = text.lstrip("\n")
    header, blank = body.split("\n", 1)[0], len(text) - len(body)
    if not columns.complete:
        raise TurnError(f"the first line must name the columns: expected {EXPECTED_COLUMNS}, got {shown(header)}")
    names = None
    if separator == "\t" and _WHISPER.fullmatch(body):
        names = ["start_ms", "end_ms", "text"]
        body, columns, blank = body.split("\n", 1)[1], Columns(names), blank + 1
    reader = csv.DictReader(
        io.StringIO(body, newline=""), names, delimiter=separator, skipinitialspace=True, strict=names is None,
        quoting=csv.QUOTE_MINIMAL if names is None else csv.QUOTE_NONE,
    )  # fmt: skip
    tiers: dict[str, Tier] = {}
    try:
        for row in reader:
            if not any(value and str(value).strip() for value in row.values()):
                continue
            where = f"line {reader.line_num + blank}"
            if None in row:
                raise TurnError(f"{where}: the row has more fields than the header; quote fields with {separator!r}")
            tier = tiers.setdefault(columns.recording(row), Tier(columns.recording(row), unit="rows"))
            span = columns.span(row, where)
            if not (span.text and span.is_silence):
                tier.spans.append(span)
    except csv.Error as error:
        raise TurnError(f"line {reader.line_num + blank}: the table can't be read: {error}") from error
    return list(tiers.values())


def _best(text: str) -> tuple[str, Columns]:
    """The separator with which the header names the most, and its columns."""
    header = text.lstrip("\n").split("\n", 1)[0]
    found = []
    for separator in _SEPARATORS:
        try:
            names = next(csv.reader([header], delimiter=separator, skipinitialspace=True), [])
        except csv.Error:
            continue
        found.append((separator, Columns(names)))
    return max(found, key=lambda item: (item[1].complete, item[1].count)) if found else (",", Columns([]))
