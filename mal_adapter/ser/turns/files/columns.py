"""Which column of a table, or key of a JSON object, has what of a turn, by its name."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mal_adapter.errors import TurnError
from mal_adapter.ser.names import cleaned, folded
from mal_adapter.ser.turns.files.span import Span, seconds
from mal_adapter.serialization.text import shown

__all__ = ["EXPECTED_COLUMNS", "Columns"]

_MS = {"ms", "msec", "msecs", "millis", "millisecond", "milliseconds"}
_S = {"s", "sec", "secs", "second", "seconds", "ss", "hh", "mm"}
_FILLERS = {"time", "times", "timestamp", "in", "at", "ts"}
#: Role -> names without units and fillers, the best first.
_NAMES = {
    "start": ("start", "begin", "onset", "from", "tmin", "xmin", "tstart", "offset"),
    "end": ("end", "stop", "finish", "to", "until", "tmax", "xmax", "tend", "offset"),
    "duration": ("duration", "dur", "length", "len"),
    "speaker": (
        "speaker", "speakername", "speakerid", "speakerlabel", "spk", "spkr", "participant", "name", "who", "person",
        "talker", "voice", "tier", "role",
    ),
    "channel": ("channel", "channelid", "chan", "ch"),
    "text": ("text", "transcript", "transcription", "utterance", "sentence", "content"),
    "emotion": ("truth", "emotion"),
    "recording": ("recording", "recordingid", "file", "filename", "audio", "audiofile", "audiofilepath", "uri", "path"),
}  # fmt: skip
EXPECTED_COLUMNS = "start and end (or duration) in seconds, and if known speaker, text, channel and emotion"


class Columns:
    """The columns that have times, speaker, text, channel, emotion and recording.

    Args:
        names: The table's header, or the keys of an object.

    Example:
        >>> columns = Columns(["Begin Time - ss.msec", "Duration (ms)", "Tier"])
        >>> columns.span({"Begin Time - ss.msec": "1,5", "Duration (ms)": "250", "Tier": "Ann"}, "line 2")
        Span(where='line 2', start_s=1.5, end_s=1.75, speaker='Ann', text='', channel=None, emotion='')
    """

    def __init__(self, names: Iterable[str]) -> None:
        given = [(name, *_role_key(name)) for name in names]
        keys = {key for _, key, _ in given}
        self._of: dict[str, tuple[str, float]] = {}
        for role, spellings in _NAMES.items():
            if role == "start" and "onset" in keys:  # then the offset is the end
                spellings = spellings[:-1]
            for spelling in spellings:
                found = [(name, scale) for name, key, scale in given if key == spelling]
                taken = {name for name, _ in self._of.values()}
                found = [item for item in found if item[0] not in taken]
                if found:
                    self._of[role] = found[0]
                    break

    @property
    def complete(self) -> bool:
        """Whether there are a start, and an end or a duration."""
        return "start" in self._of and ("end" in self._of or "duration" in self._of)

    @property
    def count(self) -> int:
        """How many roles have a column."""
        return len(self._of)

    def recording(self, row: Mapping[str, Any]) -> str:
        """The recording that a row is of; "" if it names none."""
        value = self._value(row, "recording")
        return value if isinstance(value, str) else ""

    def span(self, row: Mapping[str, Any], where: str) -> Span:
        """The span of a row.

        Raises:
            TurnError: A time or the channel is missing or wrong.
        """
        start_s = self._seconds(row, "start", where)
        if self._value(row, "end") in (None, "") and "duration" in self._of:
            length_s = self._seconds(row, "duration", where)
            if length_s < 0:
                raise TurnError(f"{where}: the duration must be at least 0, got {length_s:g} s; correct it")
            end_s = round(start_s + length_s, 9)  # the digits that a person would write, not 0.30000000000000004
        else:
            end_s = self._seconds(row, "end", where)
        return Span(
            where, start_s, end_s, self._text(row, "speaker"), self._text(row, "text"), self._channel(row, where),
            self._text(row, "emotion"),
        )  # fmt: skip

    def _value(self, row: Mapping[str, Any], role: str) -> Any:
        return row.get(self._of[role][0]) if role in self._of else None

    def _seconds(self, row: Mapping[str, Any], role: str, where: str) -> float:
        value = self._value(row, role)
        if value is None or value == "":
            raise TurnError(f"{where}: the {role} is missing; expected {EXPECTED_COLUMNS}")
        scale = self._of[role][1]
        found = seconds(value, where, role)
        is_clock = isinstance(value, str) and ":" in value
        return found if is_clock or scale == 1.0 else round(found * scale, 9)

    def _text(self, row: Mapping[str, Any], role: str) -> str:
        value = self._value(row, role)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(int(value) if value == value // 1 else value)  # speakers that are only numbered
        return value if isinstance(value, str) else ""

    def _channel(self, row: Mapping[str, Any], where: str) -> int | None:
        value = self._value(row, "channel")
        text = cleaned(str(value)) if value is not None else ""
        if not text:
            return None
        if not (text.isascii() and text.isdecimal() and len(text) < 7):
            raise TurnError(f"{where}: the channel must be an integer, counted from 0, got {shown(value)}; correct it")
        return int(text)


def _role_key(name: str) -> tuple[str, float]:
    """(The name without units and fillers, seconds per unit)."""
    words = re.findall(r"[^\W\d_]+", folded(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)))
    scale = 1.0
    units = 0
    while len(words) - units > 1 and words[-1 - units] in _MS | _S:
        units += 1
    given = words[len(words) - units :] if units else []
    if given and given[-1] in _MS and not set(given) & _S:  # ELAN's "ss.msec" is seconds with a point
        scale = 0.001
    rest = words[: len(words) - units]
    kept = [word for word in rest if word not in _FILLERS] or rest
    return "".join(kept), scale
