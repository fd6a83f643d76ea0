"""The files of a corpus: found by name below a folder, clips told apart by split, tables read in any encoding."""

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
    "Clips",
    "Folder",
    "below",
    "clean_text",
    "existing_folder",
    "files_in",
    "problem_of_clip",
    "read_json",
    "read_lines",
    "read_table",
    "the_one",
]

#: Sound files by suffix; of several formats of one clip the first here is taken, since soundfile reads it.
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".m4a", ".mp4")
#: Words in the names of folders that say which split lies below.
SPLIT_WORDS = {"train": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev", "test": "test"}


def existing_folder(root: str | os.PathLike[str]) -> Path:
    """The path, if it is a folder.

    Raises:
        CorpusError: It is not.
    """
    path = existing_path(Path(root))
    if not path.is_dir():
        raise CorpusError(f"{path}: there is no such folder; give the one into which the corpus was unpacked")
    return path


def below(folder: Path, *names: str) -> Path | None:
    """The file or folder `folder/name/name…`, in whatever letter case and Unicode form; None if there is none.

    Raises:
        CorpusError: There are several.
    """
    found = paths_alike(folder.joinpath(*names))
    return the_one(found) if found else None


def files_in(folder: Path, suffix: str) -> list[Path]:
    """The files directly in a folder whose suffix is this one in whatever letter case, in natural order.

    Raises:
        CorpusError: Two differ in letter case or Unicode form alone.
    """
    names: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.casefold() == suffix and not path.name.startswith(".") and path.is_file():
            names.setdefault(folded(path.name), []).append(path)
    return sorted(map(the_one, names.values()), key=lambda path: natural(composed(path.name)))


def the_one(paths: Sequence[Path], stem: str | None = None) -> Path:
    """The one of several paths whose names look the same, which is no question if they hold the same.

    Args:
        paths: At least one.
        stem: The name that was looked for, without suffix: the paths that are written exactly so win.

    Raises:
        CorpusError: They differ. The message names two.
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
        files: (split, file), those nearest to the root first; the split is "" where names don't repeat.
    """

    def __init__(self, files: Iterable[tuple[str, Path]]) -> None:
        self._files: dict[tuple[str, str], list[Path]] = {}
        for split, path in files:
            self._files.setdefault((split, folded(path.stem)), []).append(path)

    def find(self, stem: str, split: str = "") -> Path | None:
        """The clip of this name without suffix, in whatever letter case, Unicode form and format, or None.

        Raises:
            CorpusError: Two in one folder differ in letter case or Unicode form alone.
        """
        files = self._files.get((split, folded(stem)))
        if not files:
            return None
        # Of several formats the one that soundfile reads best, then of several folders the nearest to the root.
        best = min(files, key=lambda path: SUFFIXES.index(path.suffix.casefold()))
        alike = [p for p in files if p.parent == best.parent and p.suffix.casefold() == best.suffix.casefold()]
        return the_one(alike, stem)


class Folder:
    """All files below a folder, listed once. Links are followed; hidden files and macOS's `._` files are not seen.

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
            if real in seen:  # a link back up would be walked for ever
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
            self._files += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
        self._files.sort(key=lambda path: (len(path.parts), path))

    def find(self, names: Mapping[str, str], *, source: str) -> dict[str, Path]:
        """The files of these names, the ones nearest to the root first.

        Args:
            names: Key -> name of the file.
            source: Where the files come from, for the message.

        Returns:
            Key -> path, for those that are there; at least one.

        Raises:
            CorpusError: None is there, or two in one folder differ in letter case or Unicode form alone. The message
                says what was looked for, and where.
        """
        alike: dict[str, list[Path]] = {}
        for path in self._files:
            for key, name in names.items():
                if folded(path.name) == folded(name):
                    alike.setdefault(key, []).append(path)
        found = {
            key: the_one([path for path in paths if path.parent == paths[0].parent], Path(names[key]).stem)
            for key, paths in alike.items()
        }
        if not found:
            raise CorpusError(
                f"{self.root}: looked for {', '.join(names.values())} in this folder and all below it, and found none "
                f"({len(self._files)} other files are there); they are part of {source}"
            )
        return {key: found[key] for key in names if key in found}

    def clips(self, *, by_split: bool) -> Clips:
        """The sound files, by split and name.

        Args:
            by_split: Whether names repeat between the splits. A file then counts only for the split that the nearest
                folder above it names: the clip that is missing from one split must not be taken from another. Without,
                the split is always "".
        """
        sounds = [path for path in self._files if path.suffix.casefold() in SUFFIXES]
        splits = [self._split_of(path) if by_split else "" for path in sounds]
        return Clips((split, path) for split, path in zip(splits, sounds, strict=True) if split is not None)

    def _split_of(self, path: Path) -> str | None:
        for part in reversed(path.relative_to(self.root).parts[:-1]):
            splits = {SPLIT_WORDS[word] for word in re.split("[^a-z]+", part.casefold()) if word in SPLIT_WORDS}
            if len(splits) == 1:
                return splits.pop()
        return None


def problem_of_clip(path: Path | None) -> str | None:
    """Why a clip can't be heard, as far as its header tells; None if it seems to be fine. It is not decoded."""
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
    """The rows of a CSV file, UTF-8 or cp1252, as column -> text; columns that were not asked for are dropped.

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
        CorpusError: It can not be read.
    """
    try:
        return json.loads(_decoded(path))
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{path}: this is not JSON: {error}") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, UTF-8 or cp1252, without the blanks around them.

    Raises:
        CorpusError: It can not be read.
    """
    # Neither splitlines() nor strip() alone: cp1252's ellipsis, \x85, is the end of a line and a space to them.
    return [line.strip(" \t\n") for line in io.StringIO(_decoded(path), newline=None)]


def clean_text(text: str) -> str:
    """Text as it was meant: Windows punctuation that passed through Latin-1, or UTF-8 that passed through cp1252.

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
        return data.decode("latin-1")  # clean_text makes cp1252 of it, also where bytes have no meaning there
