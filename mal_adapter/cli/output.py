"""Output of all commands: answers on stdout, everything else on stderr, colours only on terminals."""

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
    """Escape characters that the encoding of stdout or stderr lacks, as in `\\u9ad8`, from now on: a table with Chinese
    labels must not fail after all the work because a pipe on Windows is cp1252.

    Mutates `sys.stdout` and `sys.stderr`, which tqdm, rich, logging and warnings write to as well.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None under pythonw; a notebook's streams accept any text
            with contextlib.suppress(ValueError, OSError):  # the stream or its reader is closed
                stream.reconfigure(errors="backslashreplace")


def print_line(text: object) -> None:
    """Print a line of the answer on stdout."""
    _echo(text)


def print_json(content: Any) -> None:
    """Print the answer as one JSON object on stdout."""
    _echo(json.dumps(content, indent=2))


def note(text: str) -> None:
    """Print a line on stderr about something that the user may not expect."""
    _echo(f"{typer.style('note:', fg='yellow')} {text}", err=True)


def complain(error: Exception | str) -> None:
    """Print an error as one line on stderr."""
    _echo(f"{typer.style('error:', fg='red', bold=True)} {' '.join(str(error).split())}", err=True)


def _echo(text: object, *, err: bool = False) -> None:
    stream = sys.stderr if err else sys.stdout

    def echo() -> None:
        # With `file`; otherwise typer writes UTF-8 to a stream whose encoding is ASCII.
        typer.echo(text, file=stream, color=_coloured(stream))

    if "tqdm" not in sys.modules:
        return echo()
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stderr):  # a progress bar is drawn again below the line
        echo()


def _coloured(stream: TextIO) -> bool:
    """Whether to use colours, as rich and pip do: https://no-color.org, https://force-color.org, else on terminals."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


# ------------------------------------------------------------------------------------------------ tables


def width(text: str) -> int:
    """The number of terminal columns of a text on stdout: Chinese, Japanese and Korean letters take two.

    Example:
        >>> width("sad"), width("悲伤")
        (3, 4)
    """
    encoding = getattr(sys.stdout, "encoding", None)
    if encoding and not text.isascii():
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def row(cells: Sequence[str], widths: Sequence[int], right: Collection[int] = ()) -> list[str]:
    """Pad the cells of a table's row; columns in `right` are aligned right."""
    padded = []
    for column, (cell, wide) in enumerate(zip(cells, widths, strict=True)):
        space = " " * (wide - width(cell))
        padded.append(space + cell if column in right else cell + space)
    return padded


def header(cells: Sequence[str]) -> str:
    """The header row of a table."""
    return typer.style("  ".join(cells).rstrip(), bold=True)


def right_or_wrong(cell: str, right: bool) -> str:
    """A cell in green if `right`, else in red."""
    return typer.style(cell, fg="green" if right else "red")


# ------------------------------------------------------------------------------------------------ imports


def load_libraries() -> None:
    """Import torch and transformers, which takes seconds. Disables transformers' notes and progress bars about reading
    files from disk, and warnings about torchao, which transformers imports where it is installed, also for models that
    do not use it. Downloads keep their progress bars."""
    import logging as python_logging

    from mal_adapter.ser.progress import working

    for name in ("torchao", "torch.utils._pytree"):
        python_logging.getLogger(name).setLevel(python_logging.ERROR)

    with working("loading torch and transformers"):
        import torch  # noqa: F401
        from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
