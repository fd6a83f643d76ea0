"""Progress on a terminal: bars, and a line that disappears at the end."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["progress_bar", "working"]


def progress_bar(*args: Any, shown: bool = True, **options: Any) -> Any:
    """A tqdm bar on stderr if that is a terminal, or in a notebook. Logs and pipes get none. Of the processes that
    `accelerate launch` starts on a machine, only the first shows one.

    Args:
        *args, **options: Those of tqdm.
        shown: False for no bar at all.

    Example:
        >>> with progress_bar(total=2, desc="recognising", unit="utterance") as bar:
        ...     _ = bar.update(2)
    """
    from tqdm.auto import tqdm

    seen = _is_first() and (sys.stderr.isatty() or "ipykernel" in sys.modules)
    return tqdm(*args, **{"dynamic_ncols": True, "mininterval": 0.5, **options}, disable=not (shown and seen))


@contextmanager
def working(what: str, *, shown: bool = True) -> Iterator[None]:
    """Show `what` on stderr while the block runs, if stderr is a terminal; then remove it.

    Example:
        >>> with working("loading the model"):
        ...     model = "a model"
    """
    seen = shown and _is_first() and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    if seen:
        sys.stderr.write(f"{what} ...")
        sys.stderr.flush()
    try:
        yield
    finally:
        if seen:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _is_first() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"
