"""Errors of commands: one line on stderr, with --json an object on stdout, and an exit code."""

import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer

from mal_adapter.cli.output import complain, note, print_json
from mal_adapter.errors import (
    AudioError,
    ConfigError,
    CorpusError,
    LabelError,
    MalAdapterError,
    MalAdapterWarning,
    ManifestError,
    StateFormatError,
)

__all__ = ["WRONG_INPUT", "guarded", "plain_warnings"]

FAILED = 1
#: Wrong usage, as in typer; also an input file that can't be read, even if others were answered.
WRONG_INPUT = 2
#: The exit codes that a shell reports after SIGINT and SIGPIPE.
INTERRUPTED, BROKEN_PIPE = 130, 141

#: Messages of other libraries are cut at this length.
LONGEST = 400

#: A class of typer or of click, depending on typer's version.
UsageError: Any = typer.BadParameter.__mro__[1]


@contextmanager
def guarded(*, as_json: bool, debug: bool) -> Iterator[None]:
    """Turn any error in the block into a `SystemExit` and, unless the command has already printed it, a message."""
    try:
        yield
        sys.stdout.flush()
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            note("interrupted")
        elif _is_broken_pipe(stop.__context__):
            _leave_pipe()
        elif as_json and (message := _usage_error_of(stop)) is not None:
            _print_error("UsageError", message)
        raise
    except KeyboardInterrupt:
        note("interrupted")
        sys.exit(INTERRUPTED)
    except Exception as error:
        if _is_broken_pipe(error):
            _leave_pipe()
        if debug:
            traceback.print_exception(error)
        message = _explained(error)
        complain(message if isinstance(error, MalAdapterError) or debug else f"{message} ({_HINT})")
        if as_json:
            _print_error(type(error).__name__, message)
        sys.exit(WRONG_INPUT if isinstance(error, _WRONG_INPUT) else FAILED)


_WRONG_INPUT = (ConfigError, LabelError, ManifestError, CorpusError, AudioError, StateFormatError)
_HINT = "run again with --debug to see where"


def _usage_error_of(stop: SystemExit) -> str | None:
    """The message about wrong usage that typer has just printed; None if it stopped for another reason."""
    error = stop.__context__
    return str(error.format_message()) if isinstance(error, UsageError) else None


def _explained(error: Exception) -> str:
    """One line with the error and, if known, a remedy."""
    text = " ".join(str(error).split())
    if isinstance(error, MalAdapterError):
        return text
    text = text if len(text) <= LONGEST else text[:LONGEST] + "..."
    if type(error).__name__ == "OutOfMemoryError":  # torch's; compared by name, so that torch is not imported
        return f"the device has not enough memory: {text}; try --dtype bfloat16, smaller batches or --device auto"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _print_error(kind: str, message: str) -> None:
    print_json({"error": {"type": kind, "message": message}})


def _is_broken_pipe(error: BaseException | None) -> bool:
    return isinstance(error, BrokenPipeError) and error.filename is None


def _leave_pipe() -> None:
    """Exit silently, as other programs do when `| head` closes the pipe."""
    with suppress(OSError, ValueError, AttributeError):  # otherwise Python prints an error when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # type: ignore[union-attr]
    sys.exit(BROKEN_PIPE)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Within the block, print this library's warnings as notes, without a line of code."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
            if issubclass(category, MalAdapterWarning):
                note(" ".join(str(message).split()))
            else:
                usual(message, category, *place)

        warnings.showwarning = show  # type: ignore[assignment]
        yield
