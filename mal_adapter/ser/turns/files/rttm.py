"""RTTM, the format of diarisation: NIST's Rich Transcription Time Marked files.

    SPEAKER call-42 1 0.50 1.75 <NA> <NA> agent <NA> <NA>

The fields are type, recording, channel from 1, start and duration in seconds, spelling, kind, speaker, confidence and
look-ahead. Lines of other types are not turns.
"""

import re
from urllib.parse import quote, unquote

from mal_adapter.errors import TurnError
from mal_adapter.ser.turns.files.span import Span, Tier, seconds
from mal_adapter.serialization.text import shown

__all__ = ["looks_like_rttm", "read_rttm", "rttm_name", "unescaped"]

#: Types that RTTM-Eval's specification (version 1.3) has beside SPEAKER.
_OTHERS = {
    "SEGMENT", "NOSCORE", "NO_RT_METADATA", "LEXEME", "NON-LEX", "NON-SPEECH", "FILLER", "EDIT", "IP", "SU", "CB",
    "A/P", "SPKR-INFO", "NOISE",
}  # fmt: skip
_CHANNEL = re.compile(r"[1-9]\d{0,5}")
_ESCAPED = re.compile(r"\s|%|\"|[\x00-\x1f\x7f]")


def looks_like_rttm(text: str) -> bool:
    """Whether the first line that is no comment is RTTM's."""
    found = next((line.split() for line in text.split("\n") if line.strip() and line.lstrip()[0] not in ";#"), [""])
    return found[0] in {"SPEAKER", *_OTHERS} and len(found) >= 8


def rttm_name(name: str) -> str:
    """A name for a field of RTTM, which can't hold spaces: these and % are written as in URLs. So are quotation marks,
    which pandas, and with it pyannote, would take for the start of a field with spaces.

    Example:
        >>> rttm_name("Ann  Lee"), rttm_name("50%"), rttm_name("Zoë")
        ('Ann%20%20Lee', '50%25', 'Zoë')
    """
    if name in ("", "<NA>"):
        return quote(name, safe="") or "<NA>"
    return _ESCAPED.sub(lambda match: quote(match[0], safe=""), name)


def unescaped(field: str) -> str:
    """The name in a field of RTTM: the reverse of `rttm_name`, and any other text as it is.

    Example:
        >>> unescaped("Ann%20Lee"), unescaped("50%"), unescaped("<NA>")
        ('Ann Lee', '50%', '')
    """
    if field == "<NA>":
        return ""
    name = unquote(field, errors="strict") if _is_escaped(field) else field
    return name if rttm_name(name) == field else field


def _is_escaped(field: str) -> bool:
    try:
        return unquote(field, errors="strict") != field
    except UnicodeDecodeError:
        return False


def read_rttm(text: str) -> list[Tier]:
    """One tier per recording. Channels are known if the file has lines of several channels, or of another than 1."""
    tiers: dict[str, Tier] = {}
    rows: list[tuple[str, str, float, float, str, str]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        fields, where = line.split(), f"line {number}"
        if not fields or line.lstrip().startswith((";", "#")) or fields[0].upper() in _OTHERS:
            continue
        if fields[0].upper() != "SPEAKER":
            raise TurnError(f"{where}: expected a line that starts with SPEAKER, got {shown(line.strip())}")
        if len(fields) < 8:
            raise TurnError(
                f"{where}: a SPEAKER line has 10 fields separated by spaces, and the speaker is the 8th; got "
                f"{len(fields)} fields"
            )
        if len(fields) > 10:
            raise TurnError(
                f"{where}: a SPEAKER line has 10 fields separated by spaces, got {len(fields)}; names can't contain "
                "spaces, so replace them, for example by _"
            )
        start_s, length_s = seconds(fields[3], where, "start"), seconds(fields[4], where, "duration")
        if length_s < 0:
            raise TurnError(f"{where}: the duration must be at least 0, got {length_s:g} s; correct it")
        rows.append((where, unescaped(fields[1]), start_s, start_s + length_s, unescaped(fields[7]), fields[2]))
    known = {channel for *_, channel in rows} - {"<NA>"} != {"1"}
    for where, recording, start_s, end_s, speaker, channel in rows:
        number_of = int(channel) - 1 if known and _CHANNEL.fullmatch(channel) else None
        # Sums of decimal fractions, such as 0.1 + 0.2, get back the digits that a person would write.
        span = Span(where, start_s, round(end_s, 9), speaker, channel=number_of)
        tiers.setdefault(recording, Tier(recording, unit="lines")).spans.append(span)
    return list(tiers.values())
