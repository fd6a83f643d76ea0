"""Praat's TextGrid: a tier per speaker, an interval per turn.

Texts, long and short, are read as Praat's manual says: only numbers, quoted strings and flags count, and only where
they are separate, so that other words, line breaks and comments make no difference. praatio 6.2 and pympi 1.71 go by
lines instead: praatio stops at labels such as "see item [2]" and drops the sign of a negative start, and 1e-05, which
Praat writes, is an error or 5. Binary files are read by pympi.
"""

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from mal_adapter.errors import TurnError
from mal_adapter.extras import explain_missing
from mal_adapter.ser.names import folded
from mal_adapter.ser.turns.files.span import Span, Tier, seconds
from mal_adapter.serialization.text import shown

__all__ = ["BINARY", "looks_like_textgrid", "read_binary_textgrid", "read_textgrid"]

BINARY = b"ooBinaryFile"
_TOKEN = re.compile(
    r"""
      "(?P<string>[^"]*(?:""[^"]*)*)"
    | (?P<open>")
    | (?P<comment>![^\n]*)
    | <(?P<flag>\w+)>
    | (?P<word>[^\s"]+)
    """,
    re.VERBOSE,
)
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
#: (Place in the file, start and end in seconds, label).
_Row = tuple[str, float, float, str]
#: A single tier of this name has the speakers' names as labels.
_SPEAKER_TIERS = {"speaker", "speakers", "diarization", "diarisation"}
#: Labels that say that somebody speaks, but not what: of Praat's "To TextGrid (speech activity)", and of ours.
_SPEECH = {"speech", "sounding"}
#: Tiers of forced aligners, whose intervals are no turns: "words", "Ann - phones".
_PARTS = re.compile(r"(?:.*\W)?(?:words?|phones?|phonemes?|syllables?|segments?|mau|ort|kan|kas)", re.IGNORECASE)


def looks_like_textgrid(text: str) -> bool:
    """Whether the text starts as a TextGrid does."""
    return "ooTextFile" in text[:200] and '"TextGrid"' in text[:400]


def read_textgrid(text: str) -> list[Tier]:
    """The tiers of a TextGrid in text form."""
    tokens = _Tokens(text)
    tokens.string("the file's type")
    if (kind := tokens.string("the kind of object")) != "TextGrid":
        raise TurnError(f"this is Praat's {shown(kind)}, expected a TextGrid; save the TextGrid in Praat")
    tokens.number("the start")
    end_s = tokens.number("the end")
    if tokens.flag("whether there are tiers") != "exists":
        raise TurnError("the TextGrid has no tiers; mark the turns in Praat, with a tier per speaker")
    tiers = []
    for number in range(1, tokens.count("the number of tiers") + 1):
        kind, name = tokens.string(f"the class of tier {number}"), tokens.string(f"the name of tier {number}")
        where = f"tier {shown(name)}"
        if kind not in ("IntervalTier", "TextTier"):
            raise TurnError(f"{where}: the class must be IntervalTier or TextTier, got {shown(kind)}")
        tokens.number(f"{where}: the start")
        tokens.number(f"{where}: the end")
        rows: list[_Row] = []
        count = tokens.count(f"{where}: the number of intervals")
        for place in range(1, count + 1):
            if kind == "IntervalTier":
                here = f"{where}, interval {place}"
                times = tokens.number(f"{here}: the start"), tokens.number(f"{here}: the end")
            else:
                here = f"{where}, point {place}"
                times = (tokens.number(f"{here}: the time"),) * 2
            rows.append((here, *times, tokens.string(f"{here}: the text")))
        tiers.append(_tier(name, kind, rows, end_s))
    return _with_usual(tiers)


def read_binary_textgrid(data: bytes) -> list[Tier]:
    """The tiers of a TextGrid in Praat's binary form."""
    with explain_missing("reading binary TextGrids", extra="recordings"):
        from pympi import TextGrid

    grid = TextGrid(xmax=0)
    try:
        grid.from_file(io.BytesIO(data))
    except Exception as error:  # struct.error, TypeError, UnicodeDecodeError: pympi checks nothing itself
        raise TurnError(
            f"the binary TextGrid can't be read ({type(error).__name__}: {error}); save it as a text file in Praat"
        ) from error
    tiers = []
    for tier in grid.tiers:
        name = tier.name or ""
        rows = [
            (f"tier {shown(name)}, interval {place}", entry[0], entry[-2], entry[-1] or "")
            for place, entry in enumerate(tier.intervals, start=1)
        ]
        tiers.append(_tier(name, tier.tier_type, rows, grid.xmax))
    return _with_usual(tiers)


def _tier(name: str, kind: str, rows: Iterable[_Row], last_s: float) -> Tier:
    """A tier with what is no silence."""
    spans = []
    for where, start_s, end_s, label in rows:
        span = Span(where, seconds(start_s, where, "start"), seconds(end_s, where, "end"), name, label)
        if end_s > last_s + 1e-6:
            raise TurnError(f"{where}: the end is {end_s:g} s, after the TextGrid's end at {last_s:g} s; correct it")
        if kind == "TextTier" or not span.is_silence:
            spans.append(replace(span, text="") if folded(span.text) in _SPEECH else span)
    return Tier(name, spans, usual=kind != "TextTier", unit="points" if kind == "TextTier" else "intervals")


def _with_usual(tiers: list[Tier]) -> list[Tier]:
    """The tiers, with `usual` set for those of speakers, and with labels as names in a single tier of speakers."""
    of_intervals = [tier for tier in tiers if tier.unit == "intervals"]
    if len(of_intervals) == 1 and folded(of_intervals[0].name.strip()) in _SPEAKER_TIERS:
        only = of_intervals[0]
        only.spans = [Span(span.where, span.start_s, span.end_s, span.text) for span in only.spans]
    seen: set[tuple[tuple[float, float], ...]] = set()
    for tier in of_intervals:
        times = tuple((span.start_s, span.end_s) for span in tier.spans)
        # A tier with the same intervals as one above says something of its turns, such as an emotion.
        tier.usual = bool(times) and times not in seen and not _PARTS.fullmatch(tier.name.strip())
        seen.add(times)
    return tiers


class _Tokens:
    """The numbers, strings and flags of Praat's text files, in their order."""

    def __init__(self, text: str) -> None:
        self._tokens = self._scan(text)

    def string(self, what: str) -> str:
        return self._next("string", what).replace('""', '"')

    def number(self, what: str) -> float:
        return float(self._next("number", what))

    def flag(self, what: str) -> str:
        return self._next("flag", what)

    def count(self, what: str) -> int:
        found = self.number(what)
        if not (found.is_integer() and found >= 0):
            raise TurnError(f"{what} must be an integer, got {found:g}")
        return int(found)

    def _next(self, kind: str, what: str) -> str:
        line, found, value = next(self._tokens, (0, "", ""))
        if not found:
            raise TurnError(f"{what} is missing: the file is not complete; save it again in Praat")
        if found != kind:
            raise TurnError(f"line {line}: expected {what} as a {kind}, got {shown(value)}; save it again in Praat")
        return value

    @staticmethod
    def _scan(text: str) -> Iterator[tuple[int, str, str]]:
        """(Line, kind, value) of each token."""
        line, place = 1, 0
        for match in _TOKEN.finditer(text):
            line, place = line + text.count("\n", place, match.start()), match.start()
            kind, value = str(match.lastgroup), match[str(match.lastgroup)]
            if kind == "open":
                raise TurnError(f"line {line}: a quotation mark is not closed; save the file again in Praat")
            if kind == "word" and _NUMBER.fullmatch(value):
                kind = "number"
            if kind in ("number", "string", "flag"):
                yield line, kind, value
