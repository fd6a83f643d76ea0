"""CSV: one row per turn, for spreadsheets and data frames.

The answer is in the column `emotion`, and its probabilities in `probability <label>`; what the plain host answers is in
the same columns with `without memory`. A turn without an answer has an empty emotion and its reason in `error`.
"""

import csv
import io
import os
from collections.abc import Sequence

from mal_adapter.ser.recognizer.results import Failure, Prediction
from mal_adapter.ser.timeline.timeline import Timeline
from mal_adapter.ser.timeline.writers.parts import save

__all__ = ["write_csv"]


def write_csv(timeline: Timeline, path: str | os.PathLike[str]) -> None:
    """Write a timeline as a table: UTF-8, commas, a header."""
    probabilities = [f"probability {label}" for label in timeline.labels]
    header = [
        "recording", "session_id", "utterance_id", "speaker", "channel", "start_s", "end_s", "overlaps", "text",
        "truth", "emotion", *probabilities, "emotion without memory",
        *(f"{name} without memory" for name in probabilities), "error",
    ]  # fmt: skip
    table = io.StringIO()
    rows = csv.writer(table)  # ends rows with CR and LF, as RFC 4180 does; fields with one of them are quoted
    rows.writerow(header)
    for entry in timeline.entries:
        turn, utterance = entry.turn, entry.result.utterance
        rows.writerow([
            utterance.audio, utterance.dialogue_id, utterance.utterance_id, turn.speaker, turn.channel, turn.start_s,
            turn.end_s, str(turn.overlaps).lower(), turn.text, turn.emotion, *_answer(entry.result, timeline.labels),
            *_answer(entry.without_memory, timeline.labels), entry.error,
        ])  # fmt: skip
    save(path, table.getvalue())


def _answer(answer: Prediction | Failure | None, labels: Sequence[str]) -> list[str | float]:
    if isinstance(answer, Prediction):
        return [answer.label, *answer.probabilities.values()]
    return [""] * (1 + len(labels))
