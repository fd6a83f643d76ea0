"""ELAN's .eaf: per speaker a tier of the words, and tiers below it for the emotion, its probability and more.

The speakers' tiers have the speakers as participants. Below "agent" are "agent emotion", "agent probability" and
"agent emotion without memory", whose annotations belong to those of "agent". Where a turn could not be answered, its
emotion is "no answer" and the reason. Turns of a speaker that overlap each other are in a further tier, "agent (2)".
"""

import mimetypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mal_adapter.extras import explain_missing
from mal_adapter.ser.timeline.timeline import Timeline, TimelineEntry
from mal_adapter.ser.timeline.writers.parts import NO_ANSWER, lanes, named_once, one_line, save, ticks
from mal_adapter.serialization.text import in_unicode

__all__ = ["write_elan"]

_MS = 1000
_SCHEMA = "http://www.mpi.nl/tools/elan/EAFv3.0.xsd"
#: The places of a tier's annotations in pympi's tuples: with times, and with a parent.
_ALIGNED, _REFERRING = 0, 1
#: Name of a tier below the speaker's -> its value.
_BELOW: dict[str, Callable[[TimelineEntry], str]] = {
    "emotion": lambda entry: one_line(entry.emotion) if entry.emotion else f"{NO_ANSWER}: {one_line(entry.error)}",
    "probability": lambda entry: "" if entry.probability is None else f"{entry.probability:.4f}",
    "emotion without memory": lambda entry: one_line(entry.emotion_without_memory) or NO_ANSWER,
}


def write_elan(timeline: Timeline, path: str | os.PathLike[str]) -> None:
    """Write a timeline as an ELAN file of schema 3.0; times are in milliseconds, as ELAN's are.

    Raises:
        MissingDependencyError: The extra `recordings` is not installed.
    """
    with explain_missing("writing ELAN files", extra="recordings"):
        from pympi.Elan import Eaf, to_string

    made = Eaf(author=f"mal_adapter {timeline.version}")
    made.adocument.update({"FORMAT": "3.0", "VERSION": "3.0", "xsi:noNamespaceSchemaLocation": _SCHEMA})
    made.header["TIME_UNITS"] = "milliseconds"
    made.remove_tier("default")
    made.remove_linguistic_type("default-lt")
    made.add_linguistic_type("turn")
    made.add_linguistic_type("answer", constraints="Symbolic_Association", timealignable=False)
    _link(made, timeline.recording.absolute(), Path(path).absolute().parent)
    for name in ("model", "adapter", "prompt", "session_id"):
        if known := one_line(getattr(timeline, name)):
            made.add_property(f"mal_adapter {name}", known)
    compared = any(entry.without_memory is not None for entry in timeline.entries)
    by_lane = lanes(timeline.entries, _MS)
    slots = iter(_slots(made, [ticks(entry, _MS) for entries in by_lane.values() for entry in entries]))
    taken: set[str] = set()
    for (speaker, _), entries in by_lane.items():
        (tier,) = named_once([speaker], taken)
        made.add_tier(tier, "turn", part=speaker)
        notes = [_annotate(made, tier, _ALIGNED, (*next(slots), one_line(entry.turn.text), None)) for entry in entries]
        for kind, value in _BELOW.items():
            if kind.endswith("without memory") and not compared:
                continue
            (below,) = named_once([f"{speaker} {kind}"], taken)
            made.add_tier(below, "answer", parent=tier, part=speaker)
            for note, entry in zip(notes, entries, strict=True):
                _annotate(made, below, _REFERRING, (note, value(entry), None, None))
    save(path, to_string(made, encoding="UTF-8"))


def _slots(made: Any, times: Sequence[tuple[int, int]]) -> list[tuple[str, str]]:
    """The time slots of each turn. They are made in the order of their times, which pympi's add_annotation does not."""
    edges = sorted((ms, number, edge) for number, pair in enumerate(times) for edge, ms in enumerate(pair))
    ids = {(number, edge): made.generate_ts_id(ms) for ms, number, edge in edges}
    return [(ids[number, 0], ids[number, 1]) for number in range(len(times))]


def _annotate(made: Any, tier: str, kind: int, values: tuple[Any, ...]) -> str:
    """Add an annotation, and return its id. pympi's add_ref_annotation would look for the parent by its time."""
    note: str = made.generate_annotation_id()
    made.annotations[note] = tier
    made.tiers[tier][kind][note] = values
    return note


def _link(made: Any, recording: Path, folder: Path) -> None:
    """Name the sound file, so that ELAN opens it."""
    kind = mimetypes.guess_type(recording.name)[0] or "audio/*"
    if recording.suffix.lower() == ".wav":  # ELAN's own name for it; Python's differs between versions
        kind = "audio/x-wav"
    try:
        relative = f"./{in_unicode(Path(os.path.relpath(recording, folder)).as_posix())}"
    except ValueError:  # another drive of Windows
        relative = None
    made.add_linked_file(recording.as_uri(), relpath=relative, mimetype=kind)
