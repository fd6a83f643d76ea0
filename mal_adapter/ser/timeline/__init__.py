"""A recording as its timeline: who speaks when, with which emotion, with and without the memory."""

from typing import TYPE_CHECKING

from mal_adapter.lazy import lazy_names
from mal_adapter.ser.timeline.timeline import Timeline, TimelineEntry

if TYPE_CHECKING:
    from mal_adapter.ser.timeline.page import write_page
    from mal_adapter.ser.timeline.writers import WRITERS, read_timeline

__all__ = ["WRITERS", "Timeline", "TimelineEntry", "read_timeline", "write_page"]

if not TYPE_CHECKING:  # a checker that saw this function would take every misspelt name for an Any
    __getattr__ = lazy_names(
        __name__,
        {
            "WRITERS": "ser.timeline.writers",
            "read_timeline": "ser.timeline.writers",
            "write_page": "ser.timeline.page",
        },
    )
