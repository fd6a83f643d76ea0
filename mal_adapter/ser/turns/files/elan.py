"""ELAN's .eaf files: a tier per speaker, an annotation per turn; read by pympi.

The tiers without a parent are the speakers', named by their participants or by themselves. A tier whose annotations
refer to those of another one has their times.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.parsers import expat

from mal_adapter.errors import TurnError
from mal_adapter.extras import explain_missing
from mal_adapter.ser.turns.files.span import Span, Tier
from mal_adapter.serialization.text import shown

__all__ = ["looks_like_elan", "read_elan"]

_MS = 1000.0
#: (First time slot, last time slot, text, …) by the annotation's id, as pympi keeps them.
_Aligned = Mapping[str, tuple[str, str, str, Any]]


def looks_like_elan(data: bytes) -> bool:
    """Whether the bytes are an annotation document, in UTF-8 or UTF-16."""
    return b"<ANNOTATION_DOCUMENT" in data[:4096].replace(b"\0", b"")


def read_elan(path: Path, data: bytes) -> list[Tier]:
    """The tiers of an .eaf file.

    Args:
        path: The file, which pympi opens itself.
        data: Its content.
    """
    _check_xml(data)
    with explain_missing("reading ELAN files", extra="recordings"):
        from pympi import Eaf

    try:  # the path is absolute since pympi takes "-" for the standard input
        eaf = Eaf(str(path.absolute()), suppress_version_warning=True)
    except Exception as error:  # KeyError, IndexError, ValueError: pympi takes the schema for granted
        raise TurnError(
            f"this is XML, but no ELAN file that can be read ({type(error).__name__}: {error}); save it again in ELAN"
        ) from error
    units = eaf.header.get("TIME_UNITS", "milliseconds")
    if units != "milliseconds":
        raise TurnError(f"the times are in {shown(units)}, expected milliseconds; export the file again in ELAN")
    aligned = {name: _aligned_times(name, tier[0], eaf.timeslots) for name, tier in eaf.tiers.items()}
    parents = {note: ref[0] for tier in eaf.tiers.values() for note, ref in tier[1].items()}
    times = {note: found for notes in aligned.values() for note, found in notes.items()}
    tiers = []
    for name, (notes, references, attributes, _) in eaf.tiers.items():
        speaker = attributes.get("PARTICIPANT") or name
        spans = [
            Span(f"tier {shown(name)}, annotation {note}", *aligned[name][note], speaker, value[2])
            for note, value in notes.items()
        ]
        for note, value in references.items():
            where = f"tier {shown(name)}, annotation {note}"
            spans.append(Span(where, *_times_of_root(note, where, parents, times), speaker, value[1]))
        # ELAN's annotations may be empty: whoever transcribes marks the turns first.
        spoken = [span for span in spans if not (span.text and span.is_silence)]
        tiers.append(Tier(name, spoken, usual=not attributes.get("PARENT_REF") and bool(spoken), unit="annotations"))
    return tiers


def _check_xml(data: bytes) -> None:
    """Refuse XML that is not well-formed, or that declares entities: these can be as large as one likes, or name files.

    ELAN writes none.
    """

    def refuse(*_: object) -> None:
        raise TurnError("the XML has a document type, which may hide other files; ELAN writes none, so remove it")

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise TurnError(
            f"line {error.lineno}: the XML is not complete ({error}); save the file again in ELAN"
        ) from error
    except (LookupError, ValueError) as error:  # an encoding that Python does not have
        raise TurnError(f"the XML can't be decoded ({error}); save the file again in ELAN") from error


def _aligned_times(tier: str, notes: _Aligned, slots: Mapping[str, int | None]) -> dict[str, tuple[float, float]]:
    """(Start, end) in seconds of each annotation. Slots without a time divide what is between their neighbours evenly,
    as in ELAN."""
    chain = list(dict.fromkeys(slot for note in notes.values() for slot in note[:2]))
    try:
        known = [(place, slots[slot]) for place, slot in enumerate(chain)]
        fixed = [(place, float(ms)) for place, ms in known if ms is not None]
    except OverflowError as error:
        raise TurnError(f"tier {shown(tier)}: a time has hundreds of digits; save the file again in ELAN") from error
    except KeyError as error:
        raise TurnError(f"tier {shown(tier)}: there is no time slot {error}; save the file again in ELAN") from error
    times: dict[str, float] = {chain[place]: ms / _MS for place, ms in fixed}
    for (first, start), (last, end) in itertools.pairwise(fixed):
        for place in range(first + 1, last):
            times[chain[place]] = (start + (end - start) * (place - first) / (last - first)) / _MS
    missing = [slot for slot in chain if slot not in times]
    if missing:
        raise TurnError(f"tier {shown(tier)}: time slot {missing[0]} has no time; align it in ELAN")
    return {note: (times[value[0]], times[value[1]]) for note, value in notes.items()}


def _times_of_root(
    note: str, where: str, parents: Mapping[str, str], times: Mapping[str, tuple[float, float]]
) -> tuple[float, float]:
    """The times of the annotation that a reference leads to, over others if need be."""
    seen = {note}
    while note not in times:
        note = parents.get(note, "")
        if note in seen or (note not in parents and note not in times):
            raise TurnError(f"{where}: it refers to no annotation with times; save the file again in ELAN")
        seen.add(note)
    return times[note]
