"""The files of a corpus: finding files and clips by name, and reading tables and text."""

import contextlib
import csv
import filecmp
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mal_adapter.errors import AudioError, AudioFormatError, CorpusError
from mal_adapter.ser.names import cleaned, composed, folded, natural
from mal_adapter.ser.paths import existing_path, existing_sound, paths_alike
from mal_adapter.ser.recognizer.audio import sound_info

__all__ = [
    "SUFFIXES",
    "Clips",
    "Folder",
    "clean_text",
    "existing_folder",
    "files_in",
    "find_below",
    "problem_of_clip",
    "read_json",
    "read_lines",
    "read_table",
]

#: The suffixes of sound files. If a clip has several formats, the first here is used, since soundfile reads it.
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".m4a", ".mp4")
#: Words in the names of folders -> the split that is in the folder.
SPLIT_WORDS = {"train": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev", "test": "test"}


def existing_folder(root: str | os.PathLike[str]) -> Path:
    """The path, if it is a folder.

    Raises:
        CorpusError: It is not a folder.
    """
    path = existing_path(Path(root))
    if not path.is_dir():
        raise CorpusError(f"{path}: there is no such folder; give the one into which the corpus was unpacked")
    return path


def find_below(folder: Path, *names: str) -> Path | None:
    """The file or folder `folder/name/name…`, in any letter case and Unicode form; None if there is none.

    Raises:
        CorpusError: There are several.
    """
    found = paths_alike(folder.joinpath(*names))
    return only_one(found) if found else None


def files_in(folder: Path, suffix: str) -> list[Path]:
    """The files directly in a folder with this suffix in any letter case, in natural order.

    Raises:
        CorpusError: The names of two files differ only in letter case or Unicode form.
    """
    names: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.casefold() == suffix and not path.name.startswith(".") and path.is_file():
            names.setdefault(folded(path.name), []).append(path)
    return sorted(map(only_one, names.values()), key=lambda path: natural(composed(path.name)))


def only_one(paths: Sequence[Path], stem: str | None = None) -> Path:
    """The first of several paths whose names look the same, if all have the same content.

    Args:
        paths: At least one.
        stem: The name that was looked for, without suffix. Paths with exactly this name are preferred.

    Raises:
        CorpusError: The contents differ. The message names two paths.
    """
    first, *others = [path for path in paths if path.stem == stem] or paths
    for other in others:
        if not (first.is_file() and other.is_file() and filecmp.cmp(first, other, shallow=False)):
            raise CorpusError(
                f"{first} and {other} differ in letter case or accents alone, and it is not clear which one to read; "
                "remove one of them"
            )
    return first


class Clips:
    """The sound files of a corpus, found by name.

    Args:
        files: (split, file), those nearest to the root first. The split is "" if no name is in two splits.
    """

    def __init__(self, files: Iterable[tuple[str, Path]]) -> None:
        self._files: dict[tuple[str, str], list[Path]] = {}
        for split, path in files:
            self._files.setdefault((split, folded(path.stem)), []).append(path)

    def find(self, stem: str, split: str = "") -> Path | None:
        """The clip with this name (without suffix), in any letter case, Unicode form and format; or None.

        Raises:
            CorpusError: The names of two files in one folder differ only in letter case or Unicode form.
        """
        files = self._files.get((split, folded(stem)))
        if not files:
            return None
        # The format that soundfile reads best; then the folder nearest to the root.
        best = min(files, key=lambda path: SUFFIXES.index(path.suffix.casefold()))
        alike = [p for p in files if p.parent == best.parent and p.suffix.casefold() == best.suffix.casefold()]
        return only_one(alike, stem)


class Folder:
    """All files below a folder, listed once. Links are followed. Hidden files, macOS's `._` files too, are ignored.

    Args:
        root: The folder.

    Raises:
        CorpusError: There is no such folder.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = existing_folder(root)
        self._files: list[Path] = []
        seen: set[str] = set()
        for folder, folders, names in os.walk(self.root, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:  # a link to a folder above would be followed for ever
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
            self._files += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
        self._files.sort(key=lambda path: (len(path.parts), path))

    def find(self, names: Mapping[str, str], *, source: str) -> dict[str, Path]:
        """Find files by name. Of several files with a name, the one nearest to the root is used.

        Args:
            names: Key -> name of the file.
            source: Where to get the files, for the message.

        Returns:
            Key -> path, for the files that exist; at least one.

        Raises:
            CorpusError: None of the files exists, or the names of two in one folder differ only in letter case or
                Unicode form. The message says what was looked for, and where.
        """
        alike: dict[str, list[Path]] = {}
        for path in self._files:
            for key, name in names.items():
                if folded(path.name) == folded(name):
                    alike.setdefault(key, []).append(path)
        found = {
            key: only_one([path for path in paths if path.parent == paths[0].parent], Path(names[key]).stem)
            for key, paths in alike.items()
        }
        if not found:
            raise CorpusError(
                f"{self.root}: looked for {', '.join(names.values())} in this folder and all below it, and found none "
                f"({len(self._files)} other files are there); they are part of {source}"
            )
        return {key: found[key] for key in names if key in found}

    def sounds(self) -> list[Path]:
        """All sound files, those nearest to the root first."""
        return [path for path in self._files if path.suffix.casefold() in SUFFIXES]

    def clips(self, *, by_split: bool) -> Clips:
        """The sound files, by split and name.

        Args:
            by_split: Whether the same name may be in several splits. A file then counts only for the split that the
                nearest folder above it names, so that a clip that is missing in one split is not taken from another.
                If False, the split is always "".
        """
        sounds = self.sounds()
        splits = [self._split_of(path) if by_split else "" for path in sounds]
        return Clips((split, path) for split, path in zip(splits, sounds, strict=True) if split is not None)

    def _split_of(self, path: Path) -> str | None:
        for part in reversed(path.relative_to(self.root).parts[:-1]):
            splits = {SPLIT_WORDS[word] for word in re.split("[^a-z]+", part.casefold()) if word in SPLIT_WORDS}
            if len(splits) == 1:
                return splits.pop()
        return None


def problem_of_clip(path: Path | None) -> str | None:
    """Why the audio of a clip is unusable, by its size and header; None if they are right. It is not decoded."""
    if path is None:
        return "there is no such clip"
    try:
        path = existing_sound(path)
        if path.stat().st_size == 0:
            return "the file is empty"
        if path.suffix.casefold() in (".wav", ".flac") and sound_info(path).duration_s == 0:
            return "the file has no samples"
    except OSError:
        return "there is no such clip"
    except AudioFormatError:
        return "the file can not be read as audio"
    except AudioError as error:
        return str(error).removeprefix(f"{path}: ").partition(";")[0]
    return None


def read_table(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a CSV file, UTF-8 or cp1252, as column -> text; other columns are dropped.

    Raises:
        CorpusError: A column is missing, or the file can not be read.
    """
    columns = list(columns)
    reader = csv.reader(io.StringIO(_decoded(path), newline=""), strict=False)
    try:
        header = [folded(cleaned(name)) for name in next(reader, [])]
        missing = [name for name in columns if folded(name) not in header]
        if missing:
            raise CorpusError(
                f"{path}: the column {missing[0]!r} is missing; expected {', '.join(columns)}, got {', '.join(header)}"
            )
        at = {name: header.index(folded(name)) for name in columns}
        rows = []
        for row in reader:
            if any(cell.strip() for cell in row):
                if len(row) < len(header):
                    raise CorpusError(
                        f"{path}, line {reader.line_num}: {len(row)} columns, expected {len(header)}; "
                        "the file is cut short or not separated by commas"
                    )
                rows.append({name: clean_text(row[index]) for name, index in at.items()})
    except csv.Error as error:
        raise CorpusError(f"{path}, line {reader.line_num}: this is not CSV: {error}") from error
    return rows


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        CorpusError: The file can not be read.
    """
    try:
        return json.loads(_decoded(path))
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{path}: this is not JSON: {error}") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, UTF-8 or cp1252, without blanks at their ends.

    Raises:
        CorpusError: The file can not be read.
    """
    # Not splitlines() nor strip(): cp1252's ellipsis, \x85, is the end of a line or a space to them.
    return [line.strip(" \t\n") for line in io.StringIO(_decoded(path), newline=None)]


def clean_text(text: str) -> str:
    """Repair text: Windows punctuation that was decoded as Latin-1, or UTF-8 that was decoded as cp1252.

    Example:
        >>> clean_text("You\\x92re a genius"), clean_text("Youâ€™re a genius")
        ('You’re a genius', 'You’re a genius')
    """
    if "â€" in text:
        with contextlib.suppress(UnicodeError):
            text = text.encode("cp1252").decode("utf-8")
    if any("\x80" <= character <= "\x9f" for character in text):
        text = "".join(
            character.encode("latin-1").decode("cp1252", "ignore") if "\x80" <= character <= "\x9f" else character
            for character in text
        )
    return text.replace("\0", "").strip()


def _decoded(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path}: the file can not be read: {error.strerror or error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")  # clean_text makes cp1252 of it, also of bytes that cp1252 does not define
