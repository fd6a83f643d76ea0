"""What a person sees while something takes its time: progress bars, and a line that goes away."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["progress_bar", "working"]


def progress_bar(*args: Any, shown: bool = True, **options: Any) -> Any:
    """A tqdm bar on stderr if that is a terminal, or in a notebook; logs and pipes get none, and of the processes that
    `accelerate launch` starts on a machine only the first has one.

    Args:
        *args, **options: Tqdm's.
        shown: False for none at all.

    Example:
        >>> with progress_bar(total=2, desc="listening", unit="utterance") as bar:
        ...     _ = bar.update(2)
    """
    from tqdm.auto import tqdm

    seen = _is_first() and (sys.stderr.isatty() or "ipykernel" in sys.modules)
    return tqdm(*args, **{"dynamic_ncols": True, "mininterval": 0.5, **options}, disable=not (shown and seen))


@contextmanager
def working(what: str, *, shown: bool = True) -> Iterator[None]:
    """While the block runs, `what` stands on stderr if that is a terminal; afterwards it is gone.

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
