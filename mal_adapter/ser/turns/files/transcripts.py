"""JSON of transcribers and diarisers: WhisperX, Whisper, whisper.cpp, pyannote.audio and pyannoteAI; and JSON Lines,
such as our own timelines.

A file has one or more lists of objects with start, end, speaker and text. Lists that are not the usual one are chosen
as tiers: "exclusive_diarization" has one speaker at a time.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from mal_adapter.errors import TurnError
from mal_adapter.ser.turns.files.columns import EXPECTED_COLUMNS, Columns
from mal_adapter.ser.turns.files.span import Tier
from mal_adapter.serialization.strict_json import unique_keys
from mal_adapter.serialization.text import shown

__all__ = ["looks_like_json", "read_transcript"]

#: The lists that are used unless others are chosen, the best first.
_USUAL = (
    "identification", "diarization", "speaker_diarization", "segments", "utterances", "turns", "transcription",
    "content", "",
)  # fmt: skip


def looks_like_json(text: str) -> bool:
    """Whether the text starts with an object or a list."""
    return re.match(r"\s*[{\[]\s*(?:[\"{\[\]}])", text) is not None


def read_transcript(text: str) -> list[Tier]:
    """The lists of turns of a JSON file, or the objects of JSON Lines as one list."""
    content = _parsed(text)
    if isinstance(content, dict) and isinstance(content.get("output"), dict):  # a job of pyannoteAI
        content = content["output"]
    elif isinstance(content, dict) and "jobId" in content:
        raise TurnError(
            f"the job has the status {shown(content.get('status'))} and no output; get it when it succeeded"
        )
    lists = {"": content} if isinstance(content, list) else _lists_in(content)
    tiers = [_tier(name, items) for name, items in lists.items()]
    if not tiers:
        keys = f"the keys {', '.join(content)}" if isinstance(content, dict) else shown(content)
        raise TurnError(f"expected a list of objects with {EXPECTED_COLUMNS}, got {shown(keys)}")
    names = [tier.name for tier in tiers]
    best = next((name for name in _USUAL if name in names), names[0])
    for tier in tiers:
        tier.usual = tier.name == best
    return tiers


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise TurnError(f"line {error.lineno}: the JSON is not complete ({error.msg})") from error
    except (RecursionError, ValueError) as error:
        raise TurnError(f"the JSON can't be read: {error}") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line, object_pairs_hook=unique_keys))
            except (RecursionError, ValueError) as error:
                raise TurnError(f"line {number}: this is no JSON object: {error}") from error
    # The first line of a timeline is about the whole recording.
    return [row for row in rows if not (isinstance(row, dict) and row.get("type") == "timeline")]


def _lists_in(content: Any) -> dict[str, list[Any]]:
    """Key -> list of objects with times, also for empty lists of a known name."""
    if not isinstance(content, dict):
        return {}
    return {
        key: value
        for key, value in content.items()
        if isinstance(value, list) and ((value and _has_times(value)) or (not value and key in _USUAL))
    }


def _has_times(items: Sequence[Any]) -> bool:
    return any(isinstance(item, dict) and Columns(_flat(item)).complete for item in items)


def _flat(item: dict[str, Any]) -> dict[str, Any]:
    """An object with its times in its own keys."""
    if isinstance(item.get("segment"), dict):  # pyannote.core's Annotation.for_json
        return {**item["segment"], "speaker": item.get("label")}
    if isinstance(item.get("offsets"), dict):  # whisper.cpp, in milliseconds
        offsets = item["offsets"]
        return {"start_ms": offsets.get("from"), "end_ms": offsets.get("to"), "text": item.get("text")}
    return item


def _tier(name: str, items: Sequence[Any]) -> Tier:
    spans = []
    for number, item in enumerate(items, start=1):
        where = f"{name or 'list'}, item {number}"
        if not isinstance(item, dict):
            raise TurnError(f"{where}: expected an object with {EXPECTED_COLUMNS}, got {shown(item)}")
        item = _flat(item)
        columns = Columns(item)
        if not columns.complete:
            raise TurnError(f"{where}: expected {EXPECTED_COLUMNS}, got the keys {shown(', '.join(map(str, item)))}")
        span = columns.span(item, where)
        if not (span.text and span.is_silence):
            spans.append(span)
    return Tier(name, spans, unit="items")
