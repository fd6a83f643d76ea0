"""A spoken dialogue as data, and its file format: one JSON object per utterance and line.

    {"dialogue_id": "call-42", "utterance_id": "0", "speaker": "A", "audio": "wav/0.wav", "emotion": "neutral"}
    {"dialogue_id": "call-42", "utterance_id": "1", "speaker": "B", "audio": "call.flac", "start_s": 1.5, "end_s": 3.25}

The order of the lines is the order of the utterances; lines of several dialogues may alternate. Audio paths may be
relative to the folder of the manifest. Ids are kept in Unicode's composed form (NFC): lines whose `dialogue_id` is the
same word with composed and with decomposed accents are one dialogue, and the composed form is the session's id.
"""

import difflib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mal_adapter.errors import ManifestError
from mal_adapter.ser.names import cleaned, composed
from mal_adapter.ser.paths import existing_path, file_name, paths_alike
from mal_adapter.serialization.atomic import write_atomically
from mal_adapter.serialization.strict_json import unique_keys
from mal_adapter.serialization.text import clip

__all__ = ["Dialogue", "Utterance", "read_manifest", "write_manifest"]


@dataclass(frozen=True)
class Utterance:
    """One turn of one speaker: a sound file, or a part of one.

    Args:
        dialogue_id: The dialogue of the utterance; also the id of the memory's session. Ids are kept in composed form
            (NFC), and apart from that compared exactly.
        utterance_id: Unique within the dialogue.
        speaker: The speaker's name; like the emotion, kept without invisible characters and outer spaces.
        audio: The sound file; a string is taken as a path. If there is no file of this name, a file is used whose name
            differs only in letter case, or in accents that are composed or decomposed.
        start_s: Start of the utterance in the file, in seconds; None is the start of the file.
        end_s: End of the utterance in the file, in seconds; None is the end of the file.
        text: The words, if known.
        emotion: The true label, if known.
        channel: The channel of the file, from 0; None is the mean of all channels.

    Raises:
        ManifestError: A field has the wrong type or value. The message says what was given and what was expected.

    Example:
        >>> Utterance("call-42", "0", "A", "0.wav", start_s=1.0, end_s=2.5).emotion is None
        True
        >>> Utterance("call-42", "0", "A", "0.wav", start_s=2.5, end_s=1.0)
        Traceback (most recent call last):
        mal_adapter.errors.ManifestError: 'end_s' must be greater than 'start_s', got start_s=2.5 and end_s=1.0
    """

    dialogue_id: str
    utterance_id: str
    speaker: str
    audio: Path
    start_s: float | None = None
    end_s: float | None = None
    text: str | None = None
    emotion: str | None = None
    channel: int | None = None

    def __post_init__(self) -> None:
        for name in ("dialogue_id", "utterance_id", "speaker"):
            _require_text(name, getattr(self, name))
        # A string is accepted as a path, also from callers that do not check types.
        _require_text("audio", os.fspath(self.audio) if isinstance(self.audio, os.PathLike) else self.audio)
        object.__setattr__(self, "audio", Path(self.audio))
        for name in ("start_s", "end_s"):
            object.__setattr__(self, name, _seconds(name, getattr(self, name)))
        for name in ("text", "emotion"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ManifestError(f"{name!r} must be a string or null, got {_shown(value)}")
        for name in ("dialogue_id", "utterance_id"):
            object.__setattr__(self, name, composed(getattr(self, name)))
        object.__setattr__(self, "speaker", cleaned(self.speaker) or composed(self.speaker))
        if self.emotion is not None:
            object.__setattr__(self, "emotion", cleaned(self.emotion))
        if self.channel is not None and (type(self.channel) is not int or self.channel < 0):
            raise ManifestError(f"'channel' must be an integer, counted from 0, or null, got {_shown(self.channel)}")
        if self.end_s is not None and self.end_s <= (self.start_s or 0.0):
            raise ManifestError(
                f"'end_s' must be greater than 'start_s', got start_s={self.start_s} and end_s={self.end_s}"
            )


@dataclass(frozen=True)
class Dialogue:
    """The utterances of one conversation, in the order in which they were spoken.

    Args:
        dialogue_id: The name of the conversation.
        utterances: At least one, all of this dialogue and with different ids.

    Raises:
        ManifestError: There are no utterances, an utterance id is repeated, or an utterance is of another dialogue.

    Example:
        >>> turns = tuple(Utterance("call-42", str(n), "AB"[n % 2], f"{n}.wav") for n in range(3))
        >>> [turn.speaker for turn in Dialogue("call-42", turns).utterances]
        ['A', 'B', 'A']
    """

    dialogue_id: str
    utterances: tuple[Utterance, ...]

    def __post_init__(self) -> None:
        _require_text("dialogue_id", self.dialogue_id)
        object.__setattr__(self, "dialogue_id", composed(self.dialogue_id))
        object.__setattr__(self, "utterances", tuple(self.utterances))
        if not self.utterances:
            raise ManifestError(f"dialogue {self.dialogue_id!r} has no utterances")
        seen: set[str] = set()
        for utterance in self.utterances:
            if utterance.dialogue_id != self.dialogue_id:
                raise ManifestError(
                    f"dialogue {self.dialogue_id!r} contains utterance {utterance.utterance_id!r} "
                    f"of dialogue {utterance.dialogue_id!r}"
                )
            if utterance.utterance_id in seen:
                raise ManifestError(f"dialogue {self.dialogue_id!r} has utterance {utterance.utterance_id!r} twice")
            seen.add(utterance.utterance_id)

    @classmethod
    def from_files(
        cls, paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], dialogue_id: str | None = None
    ) -> "Dialogue":
        """A dialogue of sound files, one utterance each, by an unknown speaker. The files are not opened.

        Args:
            paths: One file, or several in the order spoken.
            dialogue_id: The name of the folder that has all files unless given, else "dialogue".

        Returns:
            Utterance ids are the names of the files, with their place in front where two files have the same name.

        Raises:
            ManifestError: There are no files, a path is not one, or a file is a manifest.

        Example:
            >>> dialogue = Dialogue.from_files(["call-42/turn1.wav", "call-42/turn2.wav"])
            >>> dialogue.dialogue_id, [turn.utterance_id for turn in dialogue.utterances]
            ('call-42', ['turn1.wav', 'turn2.wav'])
        """
        several = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        for item in several:
            given: object = item
            if not isinstance(given, (str, os.PathLike)):
                raise ManifestError(f"expected the paths of sound files, got a {type(given).__name__}")
        files = [Path(path) for path in several]
        for file in files:
            if file.suffix.lower() in (".jsonl", ".json"):
                raise ManifestError(f"{file} is a manifest and no sound file; read its dialogues with read_manifest")
        folders = {file.absolute().parent for file in files}
        name = dialogue_id
        if name is None:
            name = (file_name(folders.pop()) if len(folders) == 1 else "") or "dialogue"
        names = [file_name(file) for file in files]
        ids = [one if names.count(one) == 1 else f"{place}-{one}" for place, one in enumerate(names)]
        turns = (Utterance(name, turn_id, "?", file) for turn_id, file in zip(ids, files, strict=True))
        return cls(name, tuple(turns))


_KEYS = tuple(field.name for field in fields(Utterance))
_REQUIRED = ("dialogue_id", "utterance_id", "speaker", "audio")


def read_manifest(path: str | os.PathLike[str]) -> list[Dialogue]:
    """Read a manifest of one JSON object per line. The sound files are not opened.

    A byte order mark, CRLF line ends and blank lines are accepted.

    Args:
        path: The manifest, UTF-8.

    Returns:
        The dialogues in the order of their first lines. Relative audio paths are joined to the folder of the manifest.
        The path on the disk is used if it differs only in letter case, or in accents that are composed or decomposed,
        or if the manifest separates folders by backslashes, as Windows does.

    Raises:
        ManifestError: The file can not be read, has no utterances, or has a wrong line. The message starts with the
            file and the line number.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "calls.jsonl"
        >>> line = '{"dialogue_id": "call-42", "utterance_id": "0", "speaker": "A", "audio": "0.wav", "emotoin": "sad"}'
        >>> _ = path.write_text(line)
        >>> read_manifest(path)
        Traceback (most recent call last):
        mal_adapter.errors.ManifestError: ...calls.jsonl, line 1: unknown key 'emotoin', did you mean 'emotion'?
    """
    path = existing_path(Path(path))
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ManifestError(f"{path}: the manifest can not be read: {error.strerror or error}") from error

    turns: dict[str, list[Utterance]] = {}
    line_of: dict[tuple[str, str], int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            utterance = _parse_line(line, path.parent)
            key = (utterance.dialogue_id, utterance.utterance_id)
            if key in line_of:
                raise ManifestError(
                    f"utterance {key[1]!r} of dialogue {key[0]!r} is repeated; line {line_of[key]} has it already"
                )
        except ManifestError as error:
            raise ManifestError(f"{path}, line {number}: {error}") from error
        line_of[key] = number
        turns.setdefault(utterance.dialogue_id, []).append(utterance)
    if not turns:
        raise ManifestError(f"{path}: the manifest has no utterances; expected one JSON object per line")
    return [Dialogue(dialogue_id, tuple(utterances)) for dialogue_id, utterances in turns.items()]


def write_manifest(dialogues: Iterable[Dialogue], path: str | os.PathLike[str]) -> None:
    """Write dialogues as one JSON object per line, for `read_manifest`.

    The file is written completely or not at all. Missing folders are made. Paths of audio below the manifest's folder
    are relative, so that the folder can be moved; other paths are absolute. Fields that are None are left out.

    Args:
        dialogues: At least one, with different ids.
        path: The file; an existing one is replaced.

    Raises:
        ManifestError: There are no dialogues, or two have the same id.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> dialogue = Dialogue("call-42", (Utterance("call-42", "0", "A", folder / "0.wav", emotion="sad"),))
        >>> write_manifest([dialogue], folder / "calls.jsonl")
        >>> print((folder / "calls.jsonl").read_text().strip())
        {"dialogue_id": "call-42", "utterance_id": "0", "speaker": "A", "audio": "0.wav", "emotion": "sad"}
        >>> read_manifest(folder / "calls.jsonl") == [dialogue]
        True
    """
    path = Path(path)
    lines: list[bytes] = []
    seen: set[str] = set()
    for dialogue in dialogues:
        if dialogue.dialogue_id in seen:
            raise ManifestError(f"{path}: two dialogues have the id {dialogue.dialogue_id!r}; give them different ids")
        seen.add(dialogue.dialogue_id)
        lines.extend(_format_line(utterance, path.parent) for utterance in dialogue.utterances)
    if not lines:
        raise ManifestError(f"{path}: there are no dialogues to write")

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, b"".join(lines))


def _parse_line(line: bytes, folder: Path) -> Utterance:
    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise ManifestError(f"not UTF-8 text: {error.reason} at byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise ManifestError(f"not valid JSON: {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:
        raise ManifestError(f"not valid JSON: {error}") from error  # also a repeated key, and what Python can't parse
    if not isinstance(record, dict):
        raise ManifestError(f"expected a JSON object with the keys {', '.join(_REQUIRED)}, got {_shown(record)}")
    for key in record:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected only {', '.join(_KEYS)}"
            raise ManifestError(f"unknown key {key!r}, {hint}")
    for key in _REQUIRED:
        if key not in record:
            raise ManifestError(f"the key {key!r} is missing; every line needs {', '.join(_REQUIRED)}")
    utterance = Utterance(**record)
    # Joining changes only relative paths: `folder / absolute` is the absolute path.
    audio = folder / utterance.audio
    found = paths_alike(audio)
    if not found and not record["audio"].startswith("\\"):  # a path below the manifest, written on Windows
        found = tuple(path for path in paths_alike(folder / record["audio"].replace("\\", "/")) if path.is_file())
    return Utterance(**{**record, "audio": found[0] if len(found) == 1 else audio})


def _format_line(utterance: Utterance, folder: Path) -> bytes:
    record: dict[str, Any] = {key: getattr(utterance, key) for key in _KEYS}
    audio = utterance.audio.absolute()
    if audio.is_relative_to(folder.absolute()):
        audio = audio.relative_to(folder.absolute())
    record["audio"] = audio.as_posix()
    record = {key: value for key, value in record.items() if value is not None}
    try:
        return json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # a file name that is not UTF-8 reaches Python as lone surrogates, which JSON can escape
        return json.dumps(record).encode("ascii") + b"\n"


def _require_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ManifestError(f"{name!r} must be a non-empty string, got {_shown(value)}")
    if "\0" in value:
        raise ManifestError(f"{name!r} must not contain a null character, got {_shown(value)}")


def _seconds(name: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            seconds = float(value)
        except OverflowError:
            seconds = math.inf
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    raise ManifestError(f"{name!r} must be a number of seconds, at least 0, or null, got {_shown(value)}")


def _shown(value: object) -> str:
    """The wrong value as in the JSON, short enough for one line."""
    return clip(repr(value) if not isinstance(value, (dict, list)) else json.dumps(value, default=repr))
