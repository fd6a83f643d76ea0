"""The files of timelines in a folder: one folder per recording, and which of them are complete.

A recording's folder has the name of the file without suffix, and its files too, so that players find the subtitles
beside the recording. `run.json`, written last, says what the files were made of.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mal_adapter.errors import ConfigError
from mal_adapter.extras import require
from mal_adapter.ser.names import folded
from mal_adapter.ser.timeline.page import write_page
from mal_adapter.ser.timeline.request import session_name
from mal_adapter.ser.timeline.timeline import Timeline
from mal_adapter.ser.timeline.writers import WRITERS
from mal_adapter.serialization.atomic import folder_problem, remove_leftovers, write_atomically
from mal_adapter.serialization.strict_json import parse_json
from mal_adapter.serialization.text import in_unicode

__all__ = ["FORMATS", "OutputFolders", "digest_of_file", "digest_of_model"]

#: Format -> the suffix of its file.
FORMATS = {
    "jsonl": ".jsonl", "csv": ".csv", "rttm": ".rttm", "vtt": ".vtt", "srt": ".srt", "textgrid": ".TextGrid",
    "elan": ".eaf", "html": ".html",
}  # fmt: skip
#: Format -> the package of the extra `recordings` that it needs.
PACKAGES = {"vtt": "webvtt", "srt": "pysubs2", "textgrid": "praatio", "elan": "pympi", "html": "jinja2"}
RUN_NAME = "run.json"
#: Bytes of a stem to which every suffix can be added; file systems take 255 in all.
LONGEST_STEM = 200


class OutputFolders:
    """The folders of recordings within one folder.

    Args:
        folder: Made when the first timeline is written.
        formats: Some of `FORMATS`.
        audio: Whether pages have the sound.

    Raises:
        ConfigError: There is no such format.
    """

    def __init__(self, folder: Path, formats: Sequence[str] = tuple(FORMATS), *, audio: bool = True) -> None:
        self._folder = folder
        self._formats = tuple(dict.fromkeys(formats))
        self._audio = audio
        self._taken: dict[str, str] = {}
        if unknown := [name for name in self._formats if name not in FORMATS]:
            raise ConfigError(f"there is no format {unknown[0]!r}; give some of {', '.join(FORMATS)}")

    def of(self, recording: Path) -> Path:
        """The folder of a recording: the same in each run, and never that of another recording of the same name.

        What is mutated: the folder is taken for this recording.
        """
        path = _identity(recording)
        stem = _stem(recording)
        other = f"{stem}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
        names = [name for name in (other, stem) if self._owner(name) == path] or [stem, other]
        name = next((name for name in names if self._owner(name) in (None, path)), other)
        self._taken[folded(name)] = path
        return self._folder / name

    def _owner(self, name: str) -> str | None:
        """The recording of a folder; None if it has none yet, or if its recording has been moved away."""
        if (taken := self._taken.get(folded(name))) is not None:
            return taken
        found = _read_run(self._folder / name).get("recording")
        return found if isinstance(found, str) and os.path.exists(found) else None

    def is_complete(self, recording: Path, made_of: dict[str, Any]) -> bool:
        """Whether a recording's folder has all formats, made of the same things, and nobody has changed them since."""
        folder = self.of(recording)
        run = _read_run(folder)
        if run.get("made_of") != made_of:
            return False
        names = [self._file(recording, name).name for name in self._formats]
        if "html" in self._formats and self._audio and run.get("audio") is not True:
            return False
        with suppress(OSError):
            return all((folder / name).stat().st_size == run["files"].get(name) for name in names)
        return False

    def check(self) -> None:
        """Raise an error if the files can't be written, as far as it is known beforehand.

        Raises:
            ConfigError: The folder can't be written to.
            MissingDependencyError: A format needs a package that is not installed.
        """
        if problem := folder_problem(self._folder):
            raise ConfigError(problem)
        for name in self._formats:
            if package := PACKAGES.get(name):
                require(f"the format {name}", package, extra="recordings")

    def made(self, recording: Path, name: str) -> Path | None:
        """The file of a format; None if the complete folder of the recording has none."""
        folder, file = self.of(recording), self._file(recording, name)
        return folder / file if file.name in _read_run(folder).get("files", ()) else None

    def write(self, timeline: Timeline, made_of: dict[str, Any]) -> Path:
        """Write all formats, and last what they were made of. A folder that is interrupted is not complete.

        Args:
            timeline: Of a recording.
            made_of: Whatever the timeline depends on, as JSON.

        Returns:
            The folder.
        """
        folder = self.of(timeline.recording)
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        files = {name: self._file(timeline.recording, name) for name in self._formats}
        before = _read_run(folder)
        kept: dict[str, int] = {}
        for file in (self._file(timeline.recording, name) for name in FORMATS if name not in files):
            if file.name in before.get("files", ()):
                if before["made_of"] == made_of:
                    kept[file.name] = before["files"][file.name]
                else:  # it is of another timeline
                    (folder / file).unlink(missing_ok=True)
        (folder / RUN_NAME).unlink(missing_ok=True)
        for name, file in files.items():
            if name == "html":
                write_page(timeline, folder / file, audio=self._audio)
            else:
                WRITERS[FORMATS[name]](timeline, folder / file)
        run = {
            "recording": _identity(timeline.recording),
            "made_of": made_of,
            "audio": self._audio if "html" in files else before.get("audio", True),
            "files": kept | {file.name: (folder / file).stat().st_size for file in files.values()},
            "version": timeline.version,
        }
        write_atomically(folder / RUN_NAME, (json.dumps(run, indent=2) + "\n").encode())
        return folder

    def _file(self, recording: Path, name: str) -> Path:
        return Path(_stem(recording) + FORMATS[name])


def _stem(recording: Path) -> str:
    """The name of a recording's folder and files: without suffix, where a file system takes that as a name.

    Example:
        >>> _stem(Path("calls/call-42.wav")), _stem(Path("calls/...wav")), len(_stem(Path("x" * 251 + ".wav")))
        ('call-42', 'recording', 200)
    """
    stem = session_name(recording).rstrip(". ") or "recording"  # "." and ".." are other folders
    if len(stem.encode()) <= LONGEST_STEM:
        return stem
    digest = hashlib.sha256(stem.encode()).hexdigest()[:8]
    return f"{stem.encode()[: LONGEST_STEM - 9].decode(errors='ignore')}-{digest}"


def digest_of_file(path: Path) -> str:
    """A digest of a file's bytes, read in blocks.

    Raises:
        OSError: The file can't be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_of_model(folder: Path) -> str | None:
    """A digest of the names, sizes and times of a model's files; None for what is no folder, such as a Hub id."""
    if not folder.is_dir():
        return None
    files = sorted(
        (str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    )
    return hashlib.sha256(repr(files).encode(errors="surrogateescape")).hexdigest()


def _identity(recording: Path) -> str:
    return in_unicode(str(recording.absolute()))


def _read_run(folder: Path) -> dict[str, Any]:
    """What `run.json` says; nothing if it is missing or damaged."""
    try:
        found = parse_json((folder / RUN_NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict) or "made_of" not in found:
        return {}
    return found
