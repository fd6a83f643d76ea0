"""RTTM: one SPEAKER line per turn, which tools of diarisation read.

    SPEAKER call-42 2 0.500 1.750 <NA> sad agent 0.7500 <NA>

The fields are type, recording, channel from 1, start, duration, spelling, kind, speaker, confidence, look-ahead. The
emotion is the 7th field, the kind, which tools of diarisation ignore; its probability is the 9th, the confidence. Both
are <NA> where a turn could not be answered. Spaces, quotation marks and % are written as in URLs, since a field can't
hold spaces.
"""

import os

from mal_adapter.ser.paths import file_name
from mal_adapter.ser.timeline.timeline import Timeline
from mal_adapter.ser.timeline.writers.parts import in_order, one_line, save, speaker, ticks
from mal_adapter.ser.turns.files.rttm import rttm_name

__all__ = ["write_rttm"]

_MS = 1000


def write_rttm(timeline: Timeline, path: str | os.PathLike[str]) -> None:
    """Write a timeline as RTTM; texts and the answers without memory are not in it. The recording is named by its file,
    without the suffix."""
    name = file_name(timeline.recording)
    recording = rttm_name(one_line(name.removesuffix(timeline.recording.suffix)) or "recording")
    lines = []
    for entry in in_order(timeline.entries):
        start, end = ticks(entry, _MS)
        channel = 1 if entry.turn.channel is None else entry.turn.channel + 1
        emotion = "<NA>" if entry.emotion is None else rttm_name(one_line(entry.emotion))
        confidence = "<NA>" if entry.probability is None else f"{entry.probability:.4f}"
        lines.append(
            f"SPEAKER {recording} {channel} {start / _MS:.3f} {(end - start) / _MS:.3f} <NA> {emotion} "
            f"{rttm_name(speaker(entry))} {confidence} <NA>\n"
        )
    save(path, "".join(lines))
