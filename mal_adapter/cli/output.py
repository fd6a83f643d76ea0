"""What all commands print alike."""

from collections.abc import Sequence

import typer

__all__ = ["complain", "quiet_transformers", "row"]


def complain(error: Exception) -> None:
    """One line on stderr."""
    typer.echo(f"error: {' '.join(str(error).split())}", err=True)


def row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """A line of a table."""
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def quiet_transformers() -> None:
    """No progress bars or notes of transformers about reading files from disk; downloads keep theirs."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
