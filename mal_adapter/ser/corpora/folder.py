"""The files of a corpus: found by name below a folder, clips told apart by split, tables read in any encoding."""

import contextlib
import csv
import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mal_adapter.errors import AudioError, AudioFormatError, CorpusError
from mal_adapter.ser.audio import sound_info

__all__ = [
    "Folder",
    "clean_text",
    "existing_folder",
    "natural",
    "problem_of_clip",
    "read_json",
    "read_lines",
    "read_table",
]

#: Sound files by suffix; of several formats of one clip the first here is taken, since soundfile reads it.
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".m4a", ".mp4")
#: Words in the names of folders that say which split lies below.
SPLIT_WORDS = {"train": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev", "test": "test"}


def existing_folder(root: str | os.PathLike[str]) -> Path:
    """The path, if it is a folder.

    Raises:
        CorpusError: it is not.
    """
    path = Path(root)
    if not path.is_dir():
        raise CorpusError(f"{path}: there is no such folder; give the one into which the corpus was unpacked")
    return path


class Folder:
    """All files below a folder, listed once. Links are followed; hidden files and macOS's `._` files are not seen.

    Args:
        root: the folder.

    Raises:
        CorpusError: there is no such folder.
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
            names: key -> name of the file.
            source: where the files come from, for the message.

        Returns:
            key -> path, for those that are there; at least one.

        Raises:
            CorpusError: none is there. The message says what was looked for, and where.
        """
        found: dict[str, Path] = {}
        for path in self._files:
            for key, name in names.items():
                if path.name.casefold() == name.casefold():
                    found.setdefault(key, path)
        if not found:
            raise CorpusError(
                f"{self.root}: looked for {', '.join(names.values())} in this folder and all below it, and found none "
                f"({len(self._files)} other files are there); they are part of {source}"
            )
        return {key: found[key] for key in names if key in found}

    def clips(self, *, by_split: bool) -> dict[tuple[str, str], Path]:
        """Sound files by (split, name without suffix), the name in lower case.

        Args:
            by_split: whether names repeat between the splits. A file then counts only for the split that the nearest
                folder above it names: the clip that is missing from one split must not be taken from another. Without,
                the split is always "".
        """
        best: dict[tuple[str, str], tuple[int, Path]] = {}
        for path in self._files:
            if path.suffix.casefold() not in SUFFIXES:
                continue
            split = self._split_of(path) if by_split else ""
            if split is None:
                continue
            key = (split, path.stem.casefold())
            rank = SUFFIXES.index(path.suffix.casefold())
            if key not in best or rank < best[key][0]:
                best[key] = (rank, path)
        return {key: path for key, (_, path) in best.items()}

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
        CorpusError: a column is missing, or the file can not be read.
    """
    columns = list(columns)
    reader = csv.reader(io.StringIO(_decoded(path), newline=""), strict=False)
    try:
        header = [name.strip().casefold() for name in next(reader, [])]
        missing = [name for name in columns if name.casefold() not in header]
        if missing:
            raise CorpusError(
                f"{path}: the column {missing[0]!r} is missing; expected {', '.join(columns)}, got {', '.join(header)}"
            )
        at = {name: header.index(name.casefold()) for name in columns}
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
        CorpusError: it can not be read.
    """
    try:
        return json.loads(_decoded(path))
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{path}: this is not JSON: {error}") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, UTF-8 or cp1252, without the blanks around them.

    Raises:
        CorpusError: it can not be read.
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


def natural(text: str) -> tuple[float | str, ...]:
    """A key that sorts numbers in names by value: a2 before a10. Text and numbers alternate, so keys compare.

    Example:
        >>> sorted(["a10", "a2"], key=natural)
        ['a2', 'a10']
    """
    return tuple(float(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", text)))


def _decoded(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path}: the file can not be read: {error.strerror or error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")  # clean_text makes cp1252 of it, also where bytes have no meaning there
