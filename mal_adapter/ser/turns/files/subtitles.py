"""Subtitles: SRT, read by pysubs2, and WebVTT, read by webvtt-py.

The speaker is a voice tag (`<v Ann>`), or a name before a colon. A cue with several voices is a turn of each.
"""

import html
import io
import re

from mal_adapter.errors import TurnError
from mal_adapter.extras import explain_missing
from mal_adapter.ser.turns.files.span import Span, Tier
from mal_adapter.ser.turns.files.text import split_names
from mal_adapter.serialization.text import shown

__all__ = ["looks_like_srt", "looks_like_webvtt", "read_srt", "read_webvtt"]

_SRT_TIME = r"\d{1,2}:\d{1,2}:\d{1,2}[.,]\d{1,3}"
_SRT_TIMES = re.compile(rf"\s*{_SRT_TIME}\s*-->\s*{_SRT_TIME}(?!\d).*")
_SRT_START = re.compile(rf"\s*(?:\d+\s+)?{_SRT_TIME}\s*-->")
_VTT_TIME = r"(?:\d{1,6}:)?\d{1,2}:\d{1,2}\.\d{1,3}"
_VTT_TIMES = re.compile(rf"\s*{_VTT_TIME}\s*-->\s*{_VTT_TIME}(?:\s.*)?")
_VOICE = re.compile(r"<v(?:\.[^\s>]*)?\s+([^<>]*)>")
#: The emotion in front of the words, in files that this library wrote.
_EMOTION = re.compile(r"<c\.emotion\d*>[^<>]*</c>")
_TAG = re.compile(r"</?[a-zA-Z0-9][^<>]*>")
#: Styles of SubStation Alpha, which some SRT files have: {\an8}.
_STYLE = re.compile(r"\{\\[^{}]*\}")


def looks_like_webvtt(text: str) -> bool:
    """Whether the text starts as WebVTT does."""
    return re.match(r"WEBVTT(?:\s|$)", text) is not None


def looks_like_srt(text: str) -> bool:
    """Whether the text starts with a cue's times, or with its number and times."""
    return _SRT_START.match(text) is not None


def read_srt(text: str) -> list[Tier]:
    """The cues of an SRT file."""
    with explain_missing("reading subtitles", extra="recordings"):
        from pysubs2 import SSAFile

    numbers = _lines_of_times(text, _SRT_TIMES, "00:01:02,500 --> 00:01:04,000")
    events = SSAFile.from_string(_for_pysubs2(text), format_="srt", keep_html_tags=True).events
    _check_count(len(events), len(numbers))
    said = [_STYLE.sub("", event.text.replace(r"\N", "\n")) for event in events]
    cues = [
        (f"line {number}", event.start / 1000, event.end / 1000, words)
        for number, event, words in zip(numbers, events, said, strict=True)
    ]
    return _tiers(cues)


def _for_pysubs2(text: str) -> str:
    """The text without what pysubs2 1.8 takes for something else."""
    # Its time grows with the square of the number of blank lines in a cue.
    text = re.sub(r"\n{3,}", "\n\n", text)
    # A line of words with two times is no cue: an invisible character, which is removed later, hides them.
    lines = [line if "-->" in line else re.sub(r":(?=\d)", ":\u2060", line) for line in text.split("\n")]
    # A number at the end of a cue is taken for that of the next cue; in the last cue it may be what is said.
    return "\n".join([*lines, "", "1", ""])


def read_webvtt(text: str) -> list[Tier]:
    """The cues of a WebVTT file."""
    if not looks_like_webvtt(text):
        raise TurnError("a WebVTT file must start with a line WEBVTT; add it, or give format='srt'")
    with explain_missing("reading subtitles", extra="recordings"):
        from webvtt import WebVTT

    numbers = _lines_of_times(text, _VTT_TIMES, "00:01:02.500 --> 00:01:04.000")
    captions = WebVTT.from_buffer(io.StringIO(text), format="vtt").captions
    _check_count(len(captions), len(numbers))
    cues = []
    for number, caption in zip(numbers, captions, strict=True):
        start_s, end_s = (time.in_milliseconds() / 1000 for time in (caption.start_time, caption.end_time))
        cues.append((f"line {number}", start_s, end_s, caption.raw_text))
    return _tiers(cues)


def _lines_of_times(text: str, pattern: re.Pattern[str], example: str) -> list[int]:
    """The numbers of the lines with an arrow. The libraries leave out cues whose times they can't read."""
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if "-->" in line:
            if not pattern.fullmatch(line):
                raise TurnError(f"line {number}: expected times such as {example}, got {shown(line.strip())}")
            found.append(number)
    return found


def _check_count(read: int, present: int) -> None:
    if read != present:
        raise TurnError(
            f"{present} lines have the times of a cue, and {read} cues could be read; check the blank lines"
        )


def _tiers(cues: list[tuple[str, float, float, str]]) -> list[Tier]:
    spans = []
    unnamed: list[tuple[str, float, float, str]] = []
    for where, start_s, end_s, raw in cues:
        before, *voices = _VOICE.split(raw)
        if _plain(before):
            unnamed.append((where, start_s, end_s, _plain(before)))
        merged: dict[str, list[str]] = {}
        for name, words in zip(voices[::2], voices[1::2], strict=True):
            merged.setdefault(html.unescape(name), []).append(_plain(words))
        spans += [Span(where, start_s, end_s, name, " ".join(words)) for name, words in merged.items()]
    for (where, start_s, end_s, _), (name, words) in zip(
        unnamed, split_names([cue[3] for cue in unnamed]), strict=True
    ):
        spans.append(Span(where, start_s, end_s, name, words))
    kept = [span for span in spans if not span.is_silence or (span.speaker and not span.text)]
    return [Tier("", kept, unit="cues")]


def _plain(raw: str) -> str:
    """The words without tags."""
    return html.unescape(_TAG.sub("", _EMOTION.sub("", raw))).strip()
