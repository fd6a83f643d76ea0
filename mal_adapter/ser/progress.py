"""Progress bars where a person sees them."""

import os
import sys
from typing import Any

from tqdm.auto import tqdm

__all__ = ["progress_bar"]


def progress_bar(*args: Any, shown: bool = True, **options: Any) -> Any:
    """A tqdm bar on stderr if that is a terminal, or in a notebook; logs and pipes get none, and of the processes that
    `accelerate launch` starts on a machine only the first has one.

    Args:
        *args, **options: tqdm's.
        shown: False for none at all.

    Example:
        >>> with progress_bar(total=2, desc="listening", unit="utterance") as bar:
        ...     bar.update(2)
    """
    seen = (sys.stderr.isatty() or "ipykernel" in sys.modules) and os.environ.get("LOCAL_RANK", "0") == "0"
    return tqdm(*args, **{"dynamic_ncols": True, "mininterval": 0.5, **options}, disable=not (shown and seen))
