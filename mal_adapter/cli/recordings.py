"""Which recordings a command is to process, and what their timelines depend on."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mal_adapter.cli.hosts import find_task
from mal_adapter.cli.options import Dtype
from mal_adapter.cli.output import complain, note
from mal_adapter.ser.turns.turn import TurnSettings

if TYPE_CHECKING:
    from mal_adapter.ser.recognizer.audio import SoundInfo
    from mal_adapter.ser.turns.turn import Turn

__all__ = ["Job", "Plan", "describe_task", "find_jobs", "note_channels", "unreadable"]

#: Of files of turns, in a folder that may have the recordings too.
_SUFFIXES = {".rttm", ".textgrid", ".eaf", ".srt", ".vtt", ".txt", ".csv", ".tsv", ".json", ".jsonl"}


@dataclass(frozen=True)
class Job:
    """A recording that can be read, and its turns; None is voice activity."""

    recording: Path
    info: "SoundInfo"
    turns_from: Path | None
    turns: "list[Turn] | None"


@dataclass(frozen=True)
class Plan:
    """How turns are found, the same for all recordings."""

    turns: Path | None
    tiers: list[str] | None
    channels: list[str] | None
    settings: TurnSettings
    several: bool

    def job(self, recording: Path) -> Job:
        """Read the headers of a recording, and its turns where a file has them.

        Raises:
            AudioError, TurnError: One of them can't be read.
        """
        from mal_adapter.ser.paths import existing_sound
        from mal_adapter.ser.recognizer.audio import sound_info
        from mal_adapter.ser.timeline.request import check_channels

        recording = existing_sound(recording)
        info = sound_info(recording)
        if self.channels is not None:
            check_channels(self.channels, info, recording)
        path = None if self.turns is None else self._turns_of(recording)
        return Job(recording, info, path, None if path is None else self._read(path, recording))

    def _turns_of(self, recording: Path) -> Path:
        from mal_adapter.errors import TurnError
        from mal_adapter.ser.names import folded

        assert self.turns is not None
        if not self.turns.is_dir():
            return self.turns
        files = [
            path
            for path in sorted(self.turns.iterdir())
            if folded(path.stem) == folded(recording.stem) and path.suffix.lower() in _SUFFIXES
        ]
        if len(files) != 1:
            there = "no file" if not files else " and ".join(path.name for path in files)
            raise TurnError(f"{recording}: {self.turns} has {there} of its turns; expected one of the same name")
        return files[0]

    def _read(self, path: Path, recording: Path) -> "list[Turn]":
        from mal_adapter.ser.turns.files import read_turns

        tiers = self.tiers
        if tiers is None and self.several and path == self.turns:
            tiers = [recording.stem]  # one file for several recordings has a part for each
        return read_turns(path, tiers=tiers, channels=self.channels)

    def key(self, job: Job, task: dict[str, Any]) -> dict[str, Any]:
        """All that the answers depend on, as JSON."""
        from mal_adapter.ser.timeline.output import digest_of_file

        turns = None if job.turns is None else repr(job.turns).encode(errors="backslashreplace")
        return {
            "task": task,
            "recording": digest_of_file(job.recording),
            "turns": None if turns is None else hashlib.sha256(turns).hexdigest(),
            "settings": asdict(self.settings),
            "channels": self.channels,
        }


def find_jobs(recordings: Sequence[Path], plan: Plan) -> tuple[list[Job], list[str]]:
    """(What can be done, the errors of what can't)."""
    jobs: dict[Path, Job] = {}
    not_read = []
    for recording in recordings:
        try:
            job = plan.job(recording)
            jobs.setdefault(job.recording.absolute(), job)
        except unreadable() as error:
            complain(error)
            not_read.append(str(error))
    return list(jobs.values()), not_read


def unreadable() -> tuple[type[Exception], ...]:
    """The errors of one recording, after which the others are still done."""
    from mal_adapter.errors import AudioError, ConfigError, TurnError

    return AudioError, TurnError, ConfigError


def describe_task(
    model: str | None,
    adapter_name: str | None,
    labels: str | None,
    prompt: str | None,
    dtype: Dtype,
    *,
    memory: bool,
    compare: bool,
) -> dict[str, Any]:
    """The model, the memory and the question, found without loading the model."""
    from mal_adapter.ser.timeline.output import digest_of_model

    adapter, model_name, label_set, question = find_task(model, adapter_name, labels, prompt)
    remembers = adapter is not None and memory
    return {
        "model": model_name,
        "weights": digest_of_model(Path(model_name)),
        "adapter": adapter_name,
        "fingerprint": adapter.fingerprint() if adapter is not None and memory else None,
        # A LoRA in the adapter's folder has no part in the fingerprint.
        "adapter_files": None if adapter_name is None else digest_of_model(Path(adapter_name)),
        "memory": remembers,
        "compare": remembers and compare,
        "labels": list(label_set),
        "prompt": question,
        "dtype": dtype.value,
    }


def note_channels(jobs: Sequence[Job], plan: Plan) -> None:
    """Print a note if channels are averaged: they often have a speaker each."""
    for job in jobs:
        placed = job.turns is not None and all(turn.channel is not None for turn in job.turns)
        if job.info.channels > 1 and plan.channels is None and not placed:
            names = ["customer", "agent", *(f"speaker{number}" for number in range(3, job.info.channels + 1))]
            note(
                f"{job.recording} has {job.info.channels} channels, which are averaged; if each has a speaker, name "
                f"them: --channels {','.join(names)}"
            )
            return
