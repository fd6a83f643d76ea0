"""Praat's TextGrid: per speaker a tier of the words, one of the emotions, and one of the answers without memory.

The tiers are called "agent", "agent emotion" and "agent emotion without memory". Where the words are not known, the
interval says "speech". Where a turn could not be answered, its emotion is "no answer" and the reason. Turns of a
speaker that overlap each other are in further tiers, "agent (2)".
"""

import os
import tempfile
from pathlib import Path

from mal_adapter.extras import explain_missing
from mal_adapter.ser.timeline.timeline import Timeline
from mal_adapter.ser.timeline.writers.parts import NO_ANSWER, lanes, named_once, one_line, save, ticks

__all__ = ["write_textgrid"]

PER_S = 10_000  # shorter times would be written with an exponent, which praatio and pympi can't read


def write_textgrid(timeline: Timeline, path: str | os.PathLike[str]) -> None:
    """Write a timeline as a long TextGrid; times are rounded to 0.1 ms, and probabilities are not in it.

    Raises:
        MissingDependencyError: The extra `recordings` is not installed.
    """
    with explain_missing("writing TextGrids", extra="recordings"):
        from praatio.textgrid import IntervalTier, Textgrid

    last = max([round(timeline.duration_s * PER_S), 1, *(ticks(entry, PER_S)[1] for entry in timeline.entries)])
    grid = Textgrid(0, last / PER_S)
    taken: set[str] = set()
    for (speaker, _), entries in lanes(timeline.entries, PER_S).items():
        rows: list[tuple[str, list[str]]] = [
            (speaker, [one_line(entry.turn.text) or "speech" for entry in entries]),
            (f"{speaker} emotion", [_emotion(entry.emotion, entry.error) for entry in entries]),
        ]
        if any(entry.without_memory is not None for entry in entries):
            plain = [one_line(entry.emotion_without_memory) or NO_ANSWER for entry in entries]
            rows.append((f"{speaker} emotion without memory", plain))
        times = [tuple(tick / PER_S for tick in ticks(entry, PER_S)) for entry in entries]
        for name, labels in rows:
            (free,) = named_once([name], taken)
            spans = [(*time, label) for time, label in zip(times, labels, strict=True)]
            grid.addTier(IntervalTier(free, spans, 0, last / PER_S))
    if not taken:
        grid.addTier(IntervalTier("turns", [], 0, last / PER_S))
    with tempfile.TemporaryDirectory() as folder:  # praatio writes to a path only
        grid.save(str(Path(folder) / "made"), "long_textgrid", includeBlankSpaces=True)
        save(path, (Path(folder) / "made").read_bytes())


def _emotion(emotion: str | None, error: str | None) -> str:
    return f"{NO_ANSWER}: {one_line(error)}" if emotion is None else one_line(emotion)
