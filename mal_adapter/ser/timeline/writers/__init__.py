"""Timelines as files, one module per format. Files are written as a whole or not at all, and missing folders are made.

Turns that could not be answered are in every file, marked as such.
"""

import os
from collections.abc import Callable

from mal_adapter.ser.timeline.timeline import Timeline
from mal_adapter.ser.timeline.writers.elan import write_elan
from mal_adapter.ser.timeline.writers.jsonl import read_timeline, write_jsonl
from mal_adapter.ser.timeline.writers.rttm import write_rttm
from mal_adapter.ser.timeline.writers.srt import write_srt
from mal_adapter.ser.timeline.writers.table import write_csv
from mal_adapter.ser.timeline.writers.textgrid import write_textgrid
from mal_adapter.ser.timeline.writers.webvtt import write_webvtt

__all__ = [
    "WRITERS",
    "read_timeline",
    "write_csv",
    "write_elan",
    "write_jsonl",
    "write_rttm",
    "write_srt",
    "write_textgrid",
    "write_webvtt",
]

#: Suffix of the file -> its writer.
WRITERS: dict[str, Callable[[Timeline, str | os.PathLike[str]], None]] = {
    ".jsonl": write_jsonl,
    ".csv": write_csv,
    ".rttm": write_rttm,
    ".vtt": write_webvtt,
    ".srt": write_srt,
    ".TextGrid": write_textgrid,
    ".eaf": write_elan,
}
