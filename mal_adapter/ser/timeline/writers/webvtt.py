"""WebVTT: one cue per turn, with a voice tag for the speaker; browsers and players show it.

    00:00:00.500 --> 00:00:02.250
    <v agent><c.emotion2>(sad 75 %)</c> Let me see.</v>

The emotion is in the class span in front of the words, and the class has the number of the label: a page may give it a
colour with `::cue(.emotion2)`. There is no STYLE block, since ffmpeg 5 reads nothing after one.
"""

import os

from mal_adapter.ser.paths import file_name
from mal_adapter.ser.timeline.timeline import Timeline, TimelineEntry
from mal_adapter.ser.timeline.writers.parts import NO_ANSWER, clock, in_order, one_line, percent, save, speaker, ticks

__all__ = ["write_webvtt"]

_MS = 1000


def write_webvtt(timeline: Timeline, path: str | os.PathLike[str]) -> None:
    """Write a timeline as WebVTT. Why a turn could not be answered is in the note at the start of the file."""
    # A note between cues would be a part of the cue before it, for readers that know SRT better.
    notes = [f"{file_name(timeline.recording)}; mal_adapter {timeline.version}; {timeline.prompt}"]
    cues = []
    for number, entry in enumerate(in_order(timeline.entries), start=1):
        if entry.error is not None:
            notes.append(f"{number}: {NO_ANSWER}: {entry.error}")
        start, end = (clock(ms, ".") for ms in ticks(entry, _MS))
        words = f" {_escaped(text)}" if (text := one_line(entry.turn.text)) else ""
        voice = f"<v {_escaped(speaker(entry))}>{_emotion(entry, timeline)}{words}</v>"
        cues.append(f"{number}\n{start} --> {end}\n{voice}\n")
    said = "\n".join(one_line(note).replace("-->", "->") for note in notes)
    save(path, "\n".join([f"WEBVTT\n\nNOTE\n{said}\n", *cues]))


def _emotion(entry: TimelineEntry, timeline: Timeline) -> str:
    if entry.emotion is None:
        return f"<c.emotion>({NO_ANSWER})</c>"
    number = timeline.labels.index(entry.emotion)
    return f"<c.emotion{number}>({_escaped(one_line(entry.emotion))} {percent(entry.probability)})</c>"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
