"""A recording as its timeline: who speaks when, with which emotion, with and without the memory."""

from mal_adapter.ser.timeline.timeline import Timeline, TimelineEntry

__all__ = ["Timeline", "TimelineEntry"]
