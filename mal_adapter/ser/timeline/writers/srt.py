"""SRT: one cue per turn, for players that know nothing else.

    [agent]: (sad 75 %) Let me see.

The speaker is in brackets, the emotion in the parentheses behind. SRT has no escapes: characters that players take for
tags, < > { } and \\, are written as their full-width forms, and so are brackets in names.
"""

import os
import re

from mal_adapter.ser.timeline.timeline import Timeline
from mal_adapter.ser.timeline.writers.parts import NO_ANSWER, clock, in_order, one_line, percent, save, speaker, ticks

__all__ = ["write_srt"]

_MS = 1000
_TAGS = str.maketrans("<>{}\\", "＜＞｛｝＼")
#: Two times in a line make a cue for pysubs2, whatever is between them. An invisible character breaks them.
_TIME = re.compile(r"(?<=\d):(?=\d{1,2}:\d)")
_BROKEN = ":\u2060"
_BRACKETS = str.maketrans("[]", "［］")


def write_srt(timeline: Timeline, path: str | os.PathLike[str]) -> None:
    """Write a timeline as SRT."""
    cues = []
    for number, entry in enumerate(in_order(timeline.entries), start=1):
        start, end = (clock(ms, ",") for ms in ticks(entry, _MS))
        name = speaker(entry).translate(_TAGS).translate(_BRACKETS)
        emotion = NO_ANSWER if entry.emotion is None else f"{one_line(entry.emotion)} {percent(entry.probability)}"
        words = f"[{name}]: ({emotion.translate(_TAGS)}) {one_line(entry.turn.text).translate(_TAGS)}".rstrip()
        cues.append(f"{number}\n{start} --> {end}\n{_TIME.sub(_BROKEN, words)}\n")
    save(path, "\n".join(cues))
