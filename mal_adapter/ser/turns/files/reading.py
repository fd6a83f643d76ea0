"""`read_turns`: who speaks when, from the file of another tool."""

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mal_adapter.errors import ConfigError, TurnError
from mal_adapter.ser.names import cleaned, folded
from mal_adapter.ser.paths import existing_path
from mal_adapter.ser.turns.files.audacity import looks_like_labels, read_labels
from mal_adapter.ser.turns.files.elan import looks_like_elan, read_elan
from mal_adapter.ser.turns.files.rttm import looks_like_rttm, read_rttm
from mal_adapter.ser.turns.files.span import Span, Tier
from mal_adapter.ser.turns.files.subtitles import looks_like_srt, looks_like_webvtt, read_srt, read_webvtt
from mal_adapter.ser.turns.files.table import looks_like_table, read_table
from mal_adapter.ser.turns.files.text import decoded, read_bytes
from mal_adapter.ser.turns.files.textgrid import BINARY, looks_like_textgrid, read_binary_textgrid, read_textgrid
from mal_adapter.ser.turns.files.transcripts import looks_like_json, read_transcript
from mal_adapter.ser.turns.overlaps import mark_overlaps
from mal_adapter.ser.turns.turn import Turn

__all__ = ["FORMATS", "read_turns"]

#: Name -> (suffixes, whether a text looks like it, reader of the text). ELAN is XML, which is read as bytes.
_TEXTS: dict[str, tuple[tuple[str, ...], Callable[[str], bool], Callable[[str], list[Tier]]]] = {
    "webvtt": ((".vtt",), looks_like_webvtt, read_webvtt),
    "textgrid": ((".textgrid",), looks_like_textgrid, read_textgrid),
    "json": ((".json", ".jsonl"), looks_like_json, read_transcript),
    "srt": ((".srt",), looks_like_srt, read_srt),
    "rttm": ((".rttm",), looks_like_rttm, read_rttm),
    "audacity": ((".txt", ".aud"), looks_like_labels, read_labels),
    "csv": ((".csv", ".tsv"), looks_like_table, read_table),
}
FORMATS = ("rttm", "textgrid", "elan", "srt", "webvtt", "audacity", "csv", "json")


def read_turns(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    tiers: str | Sequence[str] | None = None,
    channels: Mapping[str, int] | Sequence[str] | None = None,
) -> list[Turn]:
    """Read the turns of one recording from a file that another tool has written.

    Read are RTTM, Praat's TextGrid, ELAN's .eaf, SRT, WebVTT, Audacity's labels, tables (CSV) with a header, and the
    JSON of WhisperX, Whisper, pyannote.audio and pyannoteAI; also the JSON Lines that this library writes. Texts are
    UTF-8, UTF-16 or UTF-32. Silence marks, such as empty intervals and "sil", are no turns; neither are points.

    Args:
        path: The file.
        format: One of "rttm", "textgrid", "elan", "srt", "webvtt", "audacity", "csv" and "json". Unless given, it is
            found by the file's content, then by its suffix.
        tiers: The tiers to read, by name: those of TextGrid and ELAN, lists of JSON, recordings of RTTM and CSV. Unless
            given, those of the speakers.
        channels: Speaker -> channel from 0, or the speakers' names in the order of the channels. Without it, turns have
            the channels that the file names, if any.

    Returns:
        In order of start, with overlaps marked. Names are in composed form (NFC); a speaker without a name is "?".

    Raises:
        TurnError: The file can't be read, a time is wrong, or it is not clear which tiers are meant. The message names
            the file, the line or tier, and what to do.
        ConfigError: `format` or `channels` is not as described.
        MissingDependencyError: The extra `recordings` is not installed.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "call.rttm"
        >>> _ = path.write_text("SPEAKER call 1 0.50 1.75 <NA> <NA> agent <NA> <NA>")
        >>> read_turns(path, channels=["customer", "agent"])
        [Turn(start_s=0.5, end_s=2.25, speaker='agent', channel=1, text=None, emotion=None, overlaps=False)]
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    places = _channel_places(channels)
    path = existing_path(Path(path))
    try:
        found = _read(path, format)
        turns = [_turn(span) for tier in _chosen(found, tiers) for span in tier.spans if not _says_nothing(span)]
        if not turns:
            raise TurnError(f"the file has no turns, only {_listed(found)}")
        return mark_overlaps(turns if places is None else _on_channels(turns, places))
    except TurnError as error:
        raise TurnError(f"{path}: {error}") from error.__cause__


def _read(path: Path, format: str | None) -> list[Tier]:
    data = read_bytes(path)
    if not data.strip():
        raise TurnError("the file is empty; expected one turn or more")
    if format == "elan" or (format is None and looks_like_elan(data)):
        return read_elan(path, data)
    if data.startswith(BINARY) and format in (None, "textgrid"):
        return read_binary_textgrid(data)
    text = decoded(data)
    if format is None:
        format = next((name for name, (_, looks_like, _) in _TEXTS.items() if looks_like(text)), None)
    if format is None:
        suffix = path.suffix.lower()
        format = next((name for name, (suffixes, _, _) in _TEXTS.items() if suffix in suffixes), None)
        if suffix == ".eaf":
            return read_elan(path, data)
    if format is None:
        raise TurnError(f"the format is not known; read are {', '.join(FORMATS)}, which format= can name")
    return _TEXTS[format][2](text)


def _chosen(found: Sequence[Tier], names: str | Sequence[str] | None) -> list[Tier]:
    if names is not None:
        chosen = []
        for name in [names] if isinstance(names, str) else names:
            named = [tier for tier in found if _key(tier.name) == _key(name)]
            if not named:
                near = difflib.get_close_matches(_key(name), [_key(tier.name) for tier in found], n=1)
                hint = next((f"; did you mean {tier.name!r}?" for tier in found if near == [_key(tier.name)]), "")
                raise TurnError(f"there is no tier {name!r}{hint}; the file has {_listed(found)}")
            chosen += named
        return chosen
    usual = [tier for tier in found if tier.usual]
    several = len(usual) > 1 and {tier.unit for tier in usual} <= {"lines", "rows"}
    if several:
        raise TurnError(f"the file has the turns of several recordings; choose one by tiers=: {_listed(found)}")
    if not usual and any(tier.spans for tier in found):
        raise TurnError(f"it is not clear which tiers are the speakers'; choose them by tiers=: {_listed(found)}")
    return usual


def _listed(tiers: Sequence[Tier]) -> str:
    """The tiers and their sizes, for a message; of very many, the first ones."""
    shown = []
    for tier in tiers:
        size = f"{len(tier.spans)} {tier.unit.removesuffix('s') if len(tier.spans) == 1 else tier.unit}"
        shown.append(f"{tier.name!r} ({size})" if tier.name else size)
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "") or "no tiers"


def _key(name: str) -> str:
    return folded(cleaned(name))


def _says_nothing(span: Span) -> bool:
    """Whether a span has neither length nor text.

    Raises:
        TurnError: It has a text, but no length.
    """
    if span.is_point and span.text:
        raise TurnError(
            f"{span.where}: the end must be after the start, got {span.start_s:g} s for both with the text "
            f"{span.text[:40]!r}; correct or remove it"
        )
    return span.is_point


def _turn(span: Span) -> Turn:
    return Turn(span.start_s, span.end_s, span.speaker or "?", span.channel, span.text or None, span.emotion or None)


def _channel_places(channels: Mapping[str, int] | Sequence[str] | None) -> dict[str, int] | None:
    if channels is None:
        return None
    if isinstance(channels, str):
        raise ConfigError(f"channels must be a sequence of names or a mapping, got the text {channels!r}")
    pairs = (
        channels.items() if isinstance(channels, Mapping) else ((name, place) for place, name in enumerate(channels))
    )
    places: dict[str, int] = {}
    for name, place in pairs:
        if type(place) is not int or place < 0:
            raise ConfigError(f"the channel of {name!r} must be an integer, counted from 0, got {place!r}")
        if cleaned(name) in places:
            raise ConfigError(f"channels names {name!r} twice")
        places[cleaned(name)] = place
    return places


def _on_channels(turns: Sequence[Turn], places: Mapping[str, int]) -> list[Turn]:
    unknown = sorted({turn.speaker for turn in turns} - places.keys())
    if unknown:
        raise TurnError(
            f"channels names {', '.join(map(repr, places)) or 'nobody'}, but the file also has "
            f"{', '.join(map(repr, unknown[:12]))}; give each speaker's channel"
        )
    return [
        Turn(turn.start_s, turn.end_s, turn.speaker, places[turn.speaker], turn.text, turn.emotion) for turn in turns
    ]
