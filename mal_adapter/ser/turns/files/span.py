"""`Span` and `Tier`: what a file of turns says, before it is known which parts of it are wanted."""

import math
import re
from dataclasses import dataclass, field

from mal_adapter.errors import TurnError
from mal_adapter.ser.names import cleaned, folded
from mal_adapter.serialization.text import shown

__all__ = ["Span", "Tier", "seconds"]

#: Hours, minutes, seconds: 1:02:03.5 and 02:03,5.
_CLOCK = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:[.,]\d*)?)")
#: A number with a decimal point or a decimal comma. Python's own float() also reads 1_000 and "infinity".
_NUMBER = re.compile(r"[+-]?(?:\d+(?:[.,]\d*)?|[.,]\d+)(?:[eE][+-]?\d+)?")
#: What annotators and their tools write where nobody speaks, without brackets; folded.
_SILENCE = {"", "sil", "sp", "silent", "silence", "pause", "pau", "#", "h#", "_", "<p:>", "no speech", "non-speech"}
_BRACKETS = str.maketrans("", "", "<>[](){}")


@dataclass(frozen=True)
class Span:
    """One marked part of a recording.

    Args:
        where: Its place in the file, for messages: "line 3".
        start_s, end_s: In seconds.
        speaker: "" if it is not known.
        text: The words; "" if they are not known.
        channel: From 0, if the file names one.
        emotion: The true label; "" if it is not known.

    Raises:
        TurnError: The times are no part of a recording.
    """

    where: str
    start_s: float
    end_s: float
    speaker: str = ""
    text: str = ""
    channel: int | None = None
    emotion: str = ""

    def __post_init__(self) -> None:
        for name in ("speaker", "text", "emotion"):
            object.__setattr__(self, name, cleaned(getattr(self, name).replace("\0", "")))
        times = f"{self.start_s:g} s to {self.end_s:g} s"
        if not (math.isfinite(self.start_s) and math.isfinite(self.end_s)):
            raise TurnError(f"{self.where}: the times must be numbers, got {times}; correct them")
        if self.start_s < 0:
            raise TurnError(f"{self.where}: the start must be at least 0, got {times}; correct it")
        if self.end_s < self.start_s:
            raise TurnError(f"{self.where}: the end must be after the start, got {times}; correct them")

    @property
    def is_point(self) -> bool:
        """Whether the span has no length."""
        return self.end_s == self.start_s

    @property
    def is_silence(self) -> bool:
        """Whether its text is a mark of silence, or empty."""
        text = folded(self.text)
        return text in _SILENCE or text.translate(_BRACKETS).strip() in _SILENCE


@dataclass
class Tier:
    """A part of a file that can be chosen: a tier of TextGrid and ELAN, a list of JSON, a recording of RTTM and CSV.

    Args:
        name: "" if the format has no tiers.
        spans: In the order of the file.
        usual: Whether the tier is used if no tier is chosen.
        unit: What the spans are called in messages.
    """

    name: str
    spans: list[Span] = field(default_factory=list)
    usual: bool = True
    unit: str = "intervals"


def seconds(value: object, where: str, name: str) -> float:
    """A time in seconds, of a number or of a text such as "62.5", "62,5" or "0:01:02.5".

    Raises:
        TurnError: It is none.

    Example:
        >>> seconds("1:02.5", "line 3", "start"), seconds(7, "line 3", "start")
        (62.5, 7.0)
        >>> seconds("NaN", "line 3", "start")
        Traceback (most recent call last):
        mal_adapter.errors.TurnError: line 3: the start must be a number of seconds, got 'NaN'; correct it
    """
    found = math.nan
    if isinstance(value, str):
        text = value.strip()
        if _NUMBER.fullmatch(text):
            found = float(text.replace(",", "."))
        elif clock := _CLOCK.fullmatch(text):
            hours, minutes, rest = clock.groups()
            found = 3600 * float(hours or 0) + 60 * float(minutes) + float(rest.replace(",", "."))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        found = float(value) if abs(value) < 1e15 else math.nan
    if not math.isfinite(found):
        raise TurnError(f"{where}: the {name} must be a number of seconds, got {shown(value)}; correct it")
    return found
