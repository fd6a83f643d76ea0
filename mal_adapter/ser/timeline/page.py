"""One self-contained HTML page of a timeline: waveforms, emotions over time, and the sound.

The page loads nothing: style, script, peaks and sound are within it. An hour of sound takes 19 MB of the page, and 29
MB if the recording has two channels. The rest takes some 40 kB, 1 kB per turn, and up to 240 kB per channel.
"""

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from mal_adapter.extras import require
from mal_adapter.ser.evaluation.colors import emotion_colors, ink_on
from mal_adapter.ser.names import composed
from mal_adapter.ser.paths import file_name
from mal_adapter.ser.recognizer.results import Failure, Prediction
from mal_adapter.ser.timeline.listening import Listening, listen
from mal_adapter.ser.timeline.timeline import Timeline, TimelineEntry
from mal_adapter.ser.timeline.writers.parts import save

__all__ = ["write_page"]

Voice = tuple[str, int | None]  # a speaker and a channel

#: More speakers than these share a lane: labels that are no speakers would otherwise give a lane each.
MOST_LANES = 12


@dataclass(frozen=True)
class Lane:
    """What a row of the picture shows."""

    speaker: str
    channel: int | None
    voices: frozenset[Voice]


def write_page(timeline: Timeline, path: str | os.PathLike[str], *, audio: bool = True) -> None:
    """Write a timeline as one HTML page that works without a network.

    Args:
        timeline: Its recording must still be there.
        path: The file; an existing one is replaced, and missing folders are made. It is written completely or not at
            all.
        audio: Whether the sound is in the page, so that a click plays it.

    Raises:
        AudioError: The recording can't be read.
        MissingDependencyError: jinja2 is not installed.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> import soundfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> soundfile.write(folder / "call.wav", np.zeros(8_000), 8_000)
        >>> timeline = Timeline(folder / "call.wav", 1.0, (), ("sad", "happy"), "call", "How does the speaker feel?")
        >>> write_page(timeline, folder / "call.html")
        >>> "No turns were found" in (folder / "call.html").read_text()
        True
    """
    require("the page of a timeline", "jinja2", extra="recordings")
    lanes = _lanes(timeline.entries)
    listening = listen(timeline.recording, (lane.channel for lane in lanes), audio=audio)
    page = _render(timeline, lanes, listening)
    save(path, page.encode(errors="backslashreplace"))  # a path need not be Unicode


def _lanes(entries: Sequence[TimelineEntry]) -> list[Lane]:
    """A lane per speaker, in the order of channels, then of first turns; those who speak least share the last one."""
    times: dict[Voice, float] = {}
    for entry in entries:
        voice = _voice(entry)
        times[voice] = times.get(voice, 0.0) + entry.turn.duration_s
    rest: frozenset[Voice] = frozenset()
    if len(times) > MOST_LANES:
        rest = frozenset(sorted(times, key=times.__getitem__, reverse=True)[MOST_LANES - 1 :])
    lanes = [Lane(*voice, frozenset([voice])) for voice in times if voice not in rest]
    lanes.sort(key=lambda lane: -1 if lane.channel is None else lane.channel)
    if rest:
        channels = {channel for _, channel in rest}
        lanes.append(Lane(f"{len(rest)} others", channels.pop() if len(channels) == 1 else None, rest))
    return lanes


def _voice(entry: TimelineEntry) -> Voice:
    return entry.turn.speaker, entry.turn.channel


def _render(timeline: Timeline, lanes: list[Lane], listening: Listening) -> str:
    from jinja2 import Environment
    from markupsafe import Markup

    folder = files("mal_adapter.ser.timeline")
    template, style, script = (
        folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.html.j2", "page.css", "page.js")
    )
    entries = timeline.entries
    compared = any(isinstance(entry.without_memory, Prediction) for entry in entries)
    arms = ["with memory", "without memory"] if compared else ["emotion"]
    colors = emotion_colors(timeline.labels)
    lane_of = {voice: number for number, lane in enumerate(lanes) for voice in lane.voices}
    rows = [_row(number, entry) for number, entry in enumerate(entries)]
    data = {
        "duration": timeline.duration_s,
        "labels": list(colors),
        "colors": list(colors.values()),
        "inks": [ink_on(color) for color in colors.values()],
        "arms": arms,
        "rate": listening.peaks_per_s,
        "lanes": [{"peaks": _name(lane.channel)} for lane in lanes],
        "peaks": {
            _name(channel): base64.b64encode(peaks.tobytes()).decode() for channel, peaks in listening.peaks.items()
        },
        "audio_type": "audio/mpeg",
        "turns": [_turn(entry, lane_of[_voice(entry)], list(colors), compared) for entry in entries],
    }
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        timeline=timeline,
        title=file_name(timeline.recording),
        rows=rows,
        lanes=[_lane(lane, entries, list(colors)) for lane in lanes],
        speakers=len(timeline.speakers),
        arms=arms,
        compared=compared,
        colors=colors,
        ink_on=ink_on,
        clock=_clock,
        short=_short,
        changed=sum(row["changed"] for row in rows),
        answered=sum(row["error"] is None for row in rows),
        unanswered=sum(row["error"] is not None for row in rows),
        has_words=any(row["text"] or row["error"] for row in rows),
        has_audio=listening.mp3 is not None,
        made=_made(timeline),
        data=Markup(_inert_json(data)),
        audio=Markup(base64.b64encode(listening.mp3 or b"").decode()),
        style=Markup(style),
        script=Markup(script),
        # The page's policy lets this script run and no other, whatever a name contains.
        script_digest=Markup(base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()),
    )


def _row(number: int, entry: TimelineEntry) -> dict[str, Any]:
    """What the table says of a turn."""
    turn, result, without = entry.turn, entry.result, entry.without_memory
    answered = isinstance(result, Prediction)
    compared = answered and isinstance(without, Prediction)
    return {
        "number": number,
        "start_s": turn.start_s,
        "end_s": turn.end_s,
        "speaker": turn.speaker,
        "overlaps": turn.overlaps,
        "text": turn.text,
        "error": _reason(result) if isinstance(result, Failure) else None,
        "label": result.label if isinstance(result, Prediction) else None,
        "probability": entry.probability,
        "label_without": without.label if isinstance(without, Prediction) else None,
        "probability_without": without.probabilities[without.label] if isinstance(without, Prediction) else None,
        "changed": compared and entry.emotion != entry.emotion_without_memory,
    }


def _reason(failure: Failure) -> str:
    """The message without the file, which is that of the whole page."""
    return str(failure.error).removeprefix(f"{failure.utterance.audio}: ")


def _turn(entry: TimelineEntry, lane: int, labels: list[str], compared: bool) -> list[Any]:
    """What the script knows of a turn: start, end, lane, and each answer as its label and thousandths."""
    answers = [_thousandths(entry.result, labels)]
    if compared:
        answers.append(_thousandths(entry.without_memory, labels))
    turn = entry.turn
    return [round(turn.start_s, 3), round(turn.end_s, 3), lane, *answers]


def _thousandths(answer: Prediction | Failure | None, labels: list[str]) -> list[int] | None:
    if not isinstance(answer, Prediction):
        return None
    return [labels.index(answer.label), *(round(1000 * p) for p in answer.probabilities.values())]


def _lane(lane: Lane, entries: Sequence[TimelineEntry], labels: list[str]) -> dict[str, Any]:
    own = [entry for entry in entries if _voice(entry) in lane.voices]
    return {
        "speaker": lane.speaker,
        "channel": lane.channel,
        "shares": _shares([(entry.turn.duration_s, entry.result) for entry in own], labels),
        "shares_without": _shares([(entry.turn.duration_s, entry.without_memory) for entry in own], labels),
    }


def _shares(answers: list[tuple[float, Prediction | Failure | None]], labels: list[str]) -> dict[str, float]:
    """Label -> the share of the time of answered turns; {} without any."""
    times = dict.fromkeys(labels, 0.0)
    for duration_s, answer in answers:
        if isinstance(answer, Prediction):
            times[answer.label] += duration_s
    whole = sum(times.values())
    return {label: time / whole for label, time in times.items()} if whole else {}


def _made(timeline: Timeline) -> dict[str, str]:
    """What the page says of its making, without what is not known."""
    settings = timeline.settings
    found = {
        "recording": file_name(timeline.recording),
        "session": timeline.session_id,
        "model": timeline.model,
        "memory": timeline.adapter,
        "question": timeline.prompt,
        "turns": timeline.turns_from or "voice activity",
        "settings": None if settings is None else ", ".join(f"{k} {v}" for k, v in vars(settings).items()),
        "channels": ", ".join(timeline.channels),
        "mal_adapter": timeline.version,
    }
    return {name: composed(value) for name, value in found.items() if value}


def _clock(seconds: float) -> str:
    """Minutes and seconds, as in 75:03."""
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"


def _short(name: str) -> str:
    """The last part of a folder or Hub id."""
    return Path(name.rstrip("/\\")).name or name


def _name(channel: int | None) -> str:
    return "mean" if channel is None else str(channel)


def _inert_json(content: Any) -> str:
    """JSON that can't end the element that it is in."""
    text = json.dumps(content, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
