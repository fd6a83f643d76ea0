"""What all commands print alike: answers on stdout, everything else on stderr, colours on terminals alone."""

import contextlib
import io
import json
import os
import sys
import unicodedata
from collections.abc import Collection, Sequence
from typing import Any, TextIO

import typer

__all__ = [
    "complain",
    "header",
    "load_libraries",
    "note",
    "print_json",
    "print_line",
    "right_or_wrong",
    "row",
    "take_any_text",
    "width",
]


def take_any_text() -> None:
    """From here on, characters that the encoding of stdout or stderr lacks are escaped, as in `\\u9ad8`: a table with
    Chinese labels must not fail at its first line where a pipe on Windows is cp1252, after all the work.

    What is mutated: `sys.stdout` and `sys.stderr`, which tqdm, rich, logging and warnings write to as well.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None under pythonw; a notebook's streams take everything
            with contextlib.suppress(ValueError, OSError):  # it is closed, or its reader has left
                stream.reconfigure(errors="backslashreplace")


def print_line(text: object) -> None:
    """A line of the answer, on stdout."""
    _echo(text)


def print_json(content: Any) -> None:
    """The answer as one JSON object, on stdout."""
    _echo(json.dumps(content, indent=2))


def note(text: str) -> None:
    """A line on stderr about something that the user may not expect."""
    _echo(f"{typer.style('note:', fg='yellow')} {text}", err=True)


def complain(error: Exception | str) -> None:
    """One line on stderr."""
    _echo(f"{typer.style('error:', fg='red', bold=True)} {' '.join(str(error).split())}", err=True)


def _echo(text: object, *, err: bool = False) -> None:
    stream = sys.stderr if err else sys.stdout

    def echo() -> None:
        # Given as file: of itself, typer would write UTF-8 into a stream that says it is ASCII.
        typer.echo(text, file=stream, color=_coloured(stream))

    if "tqdm" not in sys.modules:
        return echo()
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stderr):  # a bar that stands in the line comes back below
        echo()


def _coloured(stream: TextIO) -> bool:
    """As rich and pip decide: https://no-color.org and https://force-color.org, else whether a terminal shows it."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


# ------------------------------------------------------------------------------------------------ tables


def width(text: str) -> int:
    """How many columns a terminal needs for a text, as stdout shows it: Chinese, Japanese and Korean letters take two.

    Example:
        >>> width("sad"), width("悲伤")
        (3, 4)
    """
    encoding = getattr(sys.stdout, "encoding", None)
    if encoding and not text.isascii():
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def row(cells: Sequence[str], widths: Sequence[int], right: Collection[int] = ()) -> list[str]:
    """The cells of a table's line, padded; those of the columns `right` on their left."""
    padded = []
    for column, (cell, wide) in enumerate(zip(cells, widths, strict=True)):
        space = " " * (wide - width(cell))
        padded.append(space + cell if column in right else cell + space)
    return padded


def header(cells: Sequence[str]) -> str:
    """A table's first line."""
    return typer.style("  ".join(cells).rstrip(), bold=True)


def right_or_wrong(cell: str, right: bool) -> str:
    """A cell in green or red."""
    return typer.style(cell, fg="green" if right else "red")


# ------------------------------------------------------------------------------------------------ what takes time


def load_libraries() -> None:
    """Imports what takes seconds, before a command needs it, and keeps it quiet: no progress bars or notes of
    transformers about reading files from disk; downloads keep their bars."""
    from mal_adapter.ser.progress import working

    with working("loading torch and transformers"):
        import torch  # noqa: F401
        from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
