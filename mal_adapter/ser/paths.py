"""Finding files by the looks of their names: é may be one letter in a manifest and two on a disk, `.wav` be `.WAV`."""

import os
from functools import lru_cache
from pathlib import Path

from mal_adapter.errors import AudioError
from mal_adapter.ser.names import composed, folded

__all__ = ["existing_path", "existing_sound", "file_name", "paths_alike"]


def paths_alike(path: Path) -> tuple[Path, ...]:
    """The existing paths whose names look like those of a path.

    Args:
        path: Of a file or folder.

    Returns:
        `path` itself if it exists. Else the paths whose names are canonically equal, part by part; if a folder has
        none, those whose names differ also in letter case. All of them fit equally well. Without any, ().

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "e\\u0301.WAV").touch()
        >>> [found.name for found in paths_alike(folder / "\\u00e9.wav")] == ["e\\u0301.WAV"]
        True
    """
    if _exists(path):
        return (path,)
    found = [Path(path.anchor)]
    for part in path.parts[1 if path.anchor else 0 :]:
        found = [inside for folder in found for inside in _inside(folder, part)]
    return tuple(found)


def existing_path(path: Path) -> Path:
    """The one existing path whose names look like those of `path`; `path` itself if there is none, or several."""
    found = paths_alike(path)
    return found[0] if len(found) == 1 else path


def existing_sound(path: Path) -> Path:
    """The one existing file whose name looks like that of `path`; `path` itself if there is none.

    Raises:
        AudioError: There are several files. The message names them.
    """
    found = paths_alike(path)
    if len(found) > 1:
        raise AudioError(
            f"{path}: there is no such file, but {' and '.join(map(str, found))} differ from it in letter case or "
            "accents alone; give the name of one of them"
        )
    return found[0] if found else path


def file_name(path: Path) -> str:
    """A file's name as text that can be printed and can name a session, also where it is not UTF-8.

    Example:
        >>> file_name(Path("calls/e\\u0301.wav")) == "\\u00e9.wav"
        True
    """
    return composed(os.fsencode(path.name).decode(errors="replace"))


def _inside(folder: Path, part: str) -> list[Path]:
    if _exists(folder / part):
        return [folder / part]
    try:
        by_form, by_case = _names_in(os.fspath(folder), os.stat(folder).st_mtime_ns)
    except (OSError, ValueError):  # not a folder, or one that may not be listed
        return []
    text = _as_text(part)
    return [folder / name for name in by_form.get(composed(text)) or by_case.get(folded(text)) or ()]


@lru_cache(maxsize=16)
def _names_in(folder: str, mtime_ns: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The names of a folder's entries by composed form, and by form without case. The cache spares a manifest with
    many missing files a listing per file; `mtime_ns`, the time of the folder's last change, invalidates it."""
    by_form: dict[str, list[str]] = {}
    by_case: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)):
        text = _as_text(name)
        by_form.setdefault(composed(text), []).append(name)
        by_case.setdefault(folded(text), []).append(name)
    return by_form, by_case


def _as_text(name: str) -> str:
    """The name in UTF-8, also if Python takes file names for ASCII, as with LC_ALL=C and without its UTF-8 mode."""
    try:
        return os.fsencode(name).decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # text of a manifest, which is Unicode already
        return name


def _exists(path: Path) -> bool:
    try:
        return os.path.exists(path)
    except ValueError:  # Python 3.10 to 3.12 differ on names that the file system's encoding lacks
        return False
