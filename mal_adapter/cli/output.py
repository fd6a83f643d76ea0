"""What all commands print alike: answers on stdout, everything else on stderr, colours on terminals alone."""

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
    "width",
]


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
    def echo() -> None:
        typer.echo(text, err=err, color=_coloured(sys.stderr if err else sys.stdout))

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
    """How many columns a terminal needs for a text: Chinese, Japanese and Korean letters take two.

    Example:
        >>> width("sad"), width("悲伤")
        (3, 4)
    """
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
