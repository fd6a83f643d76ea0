"""The text of a file of turns, whatever wrote it; and who speaks in a line that starts with a name."""

import re
from collections.abc import Sequence
from pathlib import Path

from mal_adapter.errors import TurnError
from mal_adapter.serialization.strict_json import open_regular

__all__ = ["decoded", "read_bytes", "split_names"]

MAX_BYTES = 256 * 2**20  # an hour has about 0.1 MB in RTTM, and 2 MB in JSON with every word

_MARKS = (
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)
_SOUNDS = (b"RIFF", b"RIFX", b"fLaC", b"OggS", b"ID3", b"FORM", b"\x1aE\xdf\xa3", b"\xff\xfb", b"#!AMR", b".snd")


def read_bytes(path: Path) -> bytes:
    """The content of a file of turns.

    Raises:
        TurnError: It can't be read, is huge, or is a sound file. The message does not name the file.
    """
    try:
        file, size = open_regular(path)
    except FileNotFoundError as error:
        raise TurnError("there is no such file; check the path") from error
    except OSError as error:
        raise TurnError(f"the file can't be read: {error.strerror or error}") from error
    except ValueError as error:  # a folder opens, a pipe would wait
        raise TurnError("this is no regular file; give a file of turns") from error
    with file:
        if size > MAX_BYTES:
            raise TurnError(
                f"the file has {size / 1e6:.0f} MB, and a file of turns has at most {MAX_BYTES / 1e6:.0f} MB; give the "
                "turns of one recording"
            )
        data = file.read(MAX_BYTES + 1)
    # Texts may start with these letters, too, but have no control characters there.
    if (data.startswith(_SOUNDS) or data[4:8] == b"ftyp") and min(data[:64]) < ord("\t"):
        raise TurnError("this is a sound file, and no file of turns; give its turns, or leave them out to find them")
    return data


def decoded(data: bytes) -> str:
    """A text in UTF-8, UTF-16 or UTF-32, with a byte order mark or without, and with newlines as line ends.

    Raises:
        TurnError: It is in another encoding, empty, or no text.

    Example:
        >>> decoded(b"one\\r\\ntwo")
        'one\\ntwo'
    """
    encoding, body = "utf-8", data
    for mark, name in _MARKS:
        if data.startswith(mark):
            encoding, body = name, data[len(mark) :]
            break
    else:
        # ASCII in UTF-16 is a null byte in every other place.
        if data[:200:2].count(0) > len(data[:200:2]) / 2:
            encoding = "utf-16-be"
        elif data[1:200:2].count(0) > len(data[1:200:2]) / 2:
            encoding = "utf-16-le"
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as error:
        line = 1 + body.count(b"\n", 0, error.start)
        raise TurnError(
            f"line {line}: the text is not {encoding.upper()} (byte 0x{body[error.start]:02x}); save the file as "
            "UTF-8, for example with iconv -f WINDOWS-1252 -t UTF-8"
        ) from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise TurnError("the file is empty; expected one turn or more")
    if "\0" in text:
        raise TurnError("this is no text, and no file of turns")
    return text


#: "[SPEAKER_00]: text" and "[[SPEAKER_00]]text", which WhisperX writes in subtitles and labels.
_IN_BRACKETS = re.compile(r"(?:\[([^\[\]\n]{1,60})\]\s*:|\[\[([^\[\]\n]{1,60})\]\])\s*(.*)", re.DOTALL)
_BEFORE_COLON = re.compile(r"([^\W_][^:\n.!?;,]{0,40}?)\s*:(?:\s+(.*)|$)", re.DOTALL)
_DIARISED = re.compile(r"(?:speaker|spk|sprecher|person|interviewer|interviewee)[ _-]?\w{0,3}", re.IGNORECASE)
_MAX_WORDS = 4


def split_names(lines: Sequence[str]) -> list[tuple[str, str]]:
    """(Name, text) of each line of a transcript; the name is "" if the line has none.

    "[Name]: text" always names who speaks. "Name: text" does if the name has capital letters only or is like
    "Speaker 1", or if most lines are like this: a single "Note: text" among others does not.

    Example:
        >>> split_names(["AGENT: Hello.", "Note: this is no name", "Well.", "Yes."])[:2]
        [('AGENT', 'Hello.'), ('', 'Note: this is no name')]
        >>> split_names(["Ann: Hello.", "Tom: Hi."])
        [('Ann', 'Hello.'), ('Tom', 'Hi.')]
    """
    found = [_name_in(line.strip()) for line in lines]
    most = 2 * sum(bool(name) for name, _, _ in found) > len(lines) and len(lines) > 1
    return [
        (name, text) if name and (sure or most) else ("", line.strip())
        for (name, text, sure), line in zip(found, lines, strict=True)
    ]


def _name_in(line: str) -> tuple[str, str, bool]:
    """(Name or "", text, whether it is a name for sure)."""
    if match := _IN_BRACKETS.fullmatch(line):
        return (match[1] or match[2]).strip(), match[3].strip(), True
    if (match := _BEFORE_COLON.fullmatch(line)) and len(match[1].split()) <= _MAX_WORDS:
        name = match[1].strip()
        return name, (match[2] or "").strip(), name.isupper() or _DIARISED.fullmatch(name) is not None
    return "", line, False
