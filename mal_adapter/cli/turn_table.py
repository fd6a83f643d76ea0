"""The turns of a recording as a table in the terminal."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mal_adapter.cli.output import header, print_line, row, width

if TYPE_CHECKING:
    from mal_adapter.ser.timeline import Timeline, TimelineEntry

__all__ = ["print_turns"]


def print_turns(made: "Timeline", folder: Path | None, *, first: bool) -> None:
    """Print the turns of a recording, and mark the answers that the memory has changed.

    Args:
        made: The recording's timeline.
        folder: Where its files are; None if there are none.
        first: Whether no table is above it, from which it would have to be set off.
    """
    entries = made.entries
    compared = any(entry.emotion_without_memory is not None for entry in entries)
    title = f"{made.recording}  {_clock(made.duration_s)}, {len(entries)} turn{'s' if len(entries) != 1 else ''}"
    print_line(header([title if first else f"\n{title}"]))
    if not entries:
        print_line("no speech was found" if made.turns_from is None else "there are no turns")
    else:
        columns = ["time", "speaker", "emotion", "p", *(["without", "p"] if compared else [])]
        rows = [_cells(entry, compared) for entry in entries]
        widths = [
            max(width(cells[place]) if place < len(cells) else 0 for cells in [columns, *(r[0] for r in rows)])
            for place in range(len(columns))
        ]
        numbers = [place for place, name in enumerate(columns) if name == "p"]
        print_line(header(row(columns, widths, numbers)))
        for cells, rest, changed in rows:
            padded = row(cells, widths[: len(cells)], numbers)
            if changed:
                padded[2] = typer.style(padded[2], fg="yellow", bold=True)
            print_line("  ".join([*padded, *([rest] if rest else [])]).rstrip())
        if changes := sum(changed for _, _, changed in rows):
            print_line(f"* changed by the memory: {changes} of {sum(entry.emotion is not None for entry in entries)}")
    if folder is not None:
        print_line(f"written to {folder}")


def _cells(entry: "TimelineEntry", compared: bool) -> tuple[list[str], str, bool]:
    """(The cells of a turn, what follows them, whether the memory has changed the answer)."""
    from mal_adapter.ser.recognizer.results import Prediction

    turn, plain = entry.turn, entry.without_memory
    cells = [f"{_clock(turn.start_s)}-{_clock(turn.end_s)}", turn.speaker]
    if entry.emotion is None or entry.probability is None:
        reason = (entry.error or "").removeprefix(f"{entry.result.utterance.audio}: ").split(";")[0]
        return cells, f"no answer: {reason}", False
    cells += [entry.emotion, f"{entry.probability:.2f}"]
    if not (compared and isinstance(plain, Prediction)):
        return cells, "", False
    changed = plain.label != entry.emotion
    return [*cells, plain.label, f"{plain.probabilities[plain.label]:.2f}"], "*" if changed else "", changed


def _clock(seconds: float) -> str:
    """Minutes and seconds, as in 75:03.2."""
    tenths = round(10 * seconds)
    return f"{tenths // 600:02d}:{tenths // 10 % 60:02d}.{tenths % 10}"
