"""`Timeline`: the emotions of a recording, turn by turn, as a value and as JSON records.

A timeline is a list of records, which a file has one per line. The first has `"type": "timeline"` and what is known of
the whole; each other one has `"type": "turn"`, and is complete without the first:

    {"type": "timeline", "format_version": 1, "recording": "call.wav", "duration_s": 8.0, "labels": ["sad", "happy"], …}
    {"type": "turn", "recording": "call.wav", "speaker": "agent", "start_s": 0.5, "end_s": 2.0, "emotion": "sad", …}

Every record of a type has the same keys; what is unknown is null. The answer is `emotion` and `probabilities`, and what
the plain host answers is in `without_memory`. A turn that could not be answered has an `error` instead.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mal_adapter.errors import AudioError, AudioFormatError, AudioTooLongError, LabelError, TurnError
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.recognizer.results import Failure, Prediction
from mal_adapter.ser.turns.turn import Turn, TurnSettings
from mal_adapter.serialization.text import shown
from mal_adapter.serialization.versions import library_version

__all__ = ["Timeline", "TimelineEntry"]

FORMAT_VERSION = 1
_ERRORS = {error.__name__: error for error in (AudioError, AudioFormatError, AudioTooLongError)}


@dataclass(frozen=True)
class TimelineEntry:
    """One turn of a recording and its answer.

    Args:
        turn: Who speaks, from when to when.
        result: The answer, which read the earlier turns of the recording from the memory; a `Failure` if the turn could
            not be answered. Its utterance has the session's id as `dialogue_id`, and the turn's number as
            `utterance_id`.
        without_memory: What the plain host answers to the same turn; None if it was not asked, or if there is no
            memory.

    Example:
        >>> said = Utterance("call-42", "0000", "agent", "call-42.wav", 0.5, 2.0)
        >>> answer = Prediction(said, "sad", {"sad": 0.75, "happy": 0.25}, audio_s=1.5, elapsed_s=0.1)
        >>> entry = TimelineEntry(Turn(0.5, 2.0, "agent"), answer)
        >>> entry.emotion, entry.probability, entry.error
        ('sad', 0.75, None)
    """

    turn: Turn
    result: Prediction | Failure
    without_memory: Prediction | Failure | None = None

    @property
    def emotion(self) -> str | None:
        """The label that is the answer; None if there is no answer."""
        return self.result.label if isinstance(self.result, Prediction) else None

    @property
    def probability(self) -> float | None:
        """The probability of the answer; None if there is no answer."""
        return self.result.probabilities[self.result.label] if isinstance(self.result, Prediction) else None

    @property
    def emotion_without_memory(self) -> str | None:
        """The plain host's answer; None if there is none."""
        return self.without_memory.label if isinstance(self.without_memory, Prediction) else None

    @property
    def error(self) -> str | None:
        """Why the turn could not be answered; None if it is answered."""
        return str(self.result.error) if isinstance(self.result, Failure) else None

    def to_record(self) -> dict[str, Any]:
        """The entry as a JSON object with `"type": "turn"`.

        Example:
            >>> said = Utterance("call-42", "0000", "agent", "call-42.wav", 0.5, 2.0)
            >>> answer = Prediction(said, "sad", {"sad": 0.75, "happy": 0.25}, audio_s=1.5, elapsed_s=0.1)
            >>> record = TimelineEntry(Turn(0.5, 2.0, "agent"), answer).to_record()
            >>> record["speaker"], record["start_s"], record["emotion"], record["probabilities"], record["error"]
            ('agent', 0.5, 'sad', {'sad': 0.75, 'happy': 0.25}, None)
            >>> TimelineEntry.from_record(record).result == answer
            True
        """
        turn, utterance = self.turn, self.result.utterance
        return {
            "type": "turn",
            "recording": str(utterance.audio),
            "session_id": utterance.dialogue_id,
            "utterance_id": utterance.utterance_id,
            "speaker": turn.speaker,
            "channel": turn.channel,
            "start_s": turn.start_s,
            "end_s": turn.end_s,
            "overlaps": turn.overlaps,
            "text": turn.text,
            "truth": turn.emotion,
            **_answer_record(self.result),
            "without_memory": None if self.without_memory is None else _answer_record(self.without_memory),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "TimelineEntry":
        """The entry of a record that `to_record` made.

        Raises:
            TurnError: A key is missing, or a value is not what it should be.
        """
        try:
            turn = Turn(
                float(record["start_s"]), float(record["end_s"]), record["speaker"], record["channel"], record["text"],
                record["truth"], record["overlaps"],
            )  # fmt: skip
            utterance = Utterance(
                record["session_id"], record["utterance_id"], turn.speaker, record["recording"], turn.start_s,
                turn.end_s, turn.text, turn.emotion, turn.channel,
            )  # fmt: skip
            plain = record["without_memory"]
            return cls(turn, _answer(record, utterance), None if plain is None else _answer(plain, utterance))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise TurnError(f"a record of a turn {_complaint(error)}, got {shown(dict(record))}") from error


@dataclass(frozen=True)
class Timeline:
    """The emotions of a recording, turn by turn.

    Args:
        recording: The sound file; a string is taken as a path.
        duration_s: Its length in seconds.
        entries: In the order in which they were answered, which is that of their starts.
        labels: The possible answers, in the order of the label set.
        session_id: The id of the memory's session.
        prompt: The question after the audio.
        model: The host's name or folder, if known.
        adapter: The adapter's name or folder; None without a memory.
        turns_from: Where the turns are from: the name of a file of turns, or None for voice activity.
        settings: How voice activity became turns; None for a file of turns.
        channels: The speaker of each channel, from the first; empty if the channels have no speakers of their own.
        version: Of mal_adapter; the installed one unless given.

    Raises:
        TurnError: The length is not a number of at least 0.
        LabelError: An answer is not one of the labels.

    Example:
        >>> said = Utterance("call-42", "0000", "agent", "call-42.wav", 0.5, 2.0)
        >>> answer = Prediction(said, "sad", {"sad": 0.75, "happy": 0.25}, audio_s=1.5, elapsed_s=0.1)
        >>> entry = TimelineEntry(Turn(0.5, 2.0, "agent"), answer)
        >>> timeline = Timeline("call-42.wav", 8.0, (entry,), ("sad", "happy"), "call-42", "How does the speaker feel?")
        >>> [record["type"] for record in timeline.to_records()]
        ['timeline', 'turn']
        >>> Timeline.from_records(timeline.to_records()) == timeline
        True
        >>> timeline.speakers
        ('agent',)
    """

    recording: Path
    duration_s: float
    entries: tuple[TimelineEntry, ...]
    labels: tuple[str, ...]
    session_id: str
    prompt: str
    model: str | None = None
    adapter: str | None = None
    turns_from: str | None = None
    settings: TurnSettings | None = None
    channels: tuple[str, ...] = ()
    version: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "recording", Path(self.recording))
        for name in ("entries", "labels", "channels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "version", self.version or library_version())
        if not (math.isfinite(self.duration_s) and self.duration_s >= 0):
            raise TurnError(f"a recording's length must be seconds, at least 0, got {self.duration_s}")
        for entry in self.entries:
            for answer in (entry.result, entry.without_memory):
                if isinstance(answer, Prediction) and tuple(answer.probabilities) != self.labels:
                    raise LabelError(
                        f"the answer to utterance {answer.utterance.utterance_id!r} has the labels "
                        f"{list(answer.probabilities)}, expected the timeline's {list(self.labels)}"
                    )

    @property
    def speakers(self) -> tuple[str, ...]:
        """The names of all who speak, in the order of their first turns."""
        return tuple(dict.fromkeys(entry.turn.speaker for entry in self.entries))

    def to_records(self) -> list[dict[str, Any]]:
        """The timeline as JSON objects: one of `"type": "timeline"`, then one of `"type": "turn"` per entry."""
        whole = {
            "type": "timeline",
            "format_version": FORMAT_VERSION,
            "recording": str(self.recording),
            "duration_s": self.duration_s,
            "labels": list(self.labels),
            "session_id": self.session_id,
            "prompt": self.prompt,
            "model": self.model,
            "adapter": self.adapter,
            "turns_from": self.turns_from,
            "settings": None if self.settings is None else asdict(self.settings),
            "channels": list(self.channels),
            "version": self.version,
        }
        return [whole, *(entry.to_record() for entry in self.entries)]

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]]) -> "Timeline":
        """The timeline of the records that `to_records` made. Keys that this version does not know are ignored.

        Raises:
            TurnError: The first record is not a timeline's or of a later format; a later one is not a turn's; a key is
                missing, or a value is not what it should be.
        """
        several = iter(records)
        whole = next(several, None)
        if whole is None or whole.get("type") != "timeline":
            raise TurnError(f"the first record of a timeline must have the type 'timeline', got {shown(whole)}")
        if whole.get("format_version") != FORMAT_VERSION:
            raise TurnError(
                f"the timeline has the format {shown(whole.get('format_version'))}, and this version of mal_adapter "
                f"reads the format {FORMAT_VERSION}; update it with pip install -U mal-adapter"
            )
        entries = []
        for record in several:
            if record.get("type") != "turn":
                raise TurnError(f"the records after the first must have the type 'turn', got {shown(dict(record))}")
            entries.append(TimelineEntry.from_record(record))
        try:
            settings = whole["settings"]
            if settings is not None:
                known = {field.name for field in fields(TurnSettings)}
                settings = TurnSettings(**{name: value for name, value in settings.items() if name in known})
            return cls(
                Path(whole["recording"]), float(whole["duration_s"]), tuple(entries), tuple(whole["labels"]),
                whole["session_id"], whole["prompt"], whole["model"], whole["adapter"], whole["turns_from"],
                settings, tuple(whole["channels"]), whole["version"],
            )  # fmt: skip
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise TurnError(f"the first record of a timeline {_complaint(error)}, got {shown(dict(whole))}") from error


def _answer_record(answer: Prediction | Failure) -> dict[str, Any]:
    """The keys of an answer: the same for both kinds, so that they are columns of a table."""
    if isinstance(answer, Failure):
        return {
            "emotion": None, "probabilities": None, "audio_s": None, "elapsed_s": None,
            "error": str(answer.error), "error_type": type(answer.error).__name__,
        }  # fmt: skip
    return {
        "emotion": answer.label, "probabilities": dict(answer.probabilities), "audio_s": answer.audio_s,
        "elapsed_s": answer.elapsed_s, "error": None, "error_type": None,
    }  # fmt: skip


def _answer(record: Mapping[str, Any], utterance: Utterance) -> Prediction | Failure:
    if record["error"] is not None:
        return Failure(utterance, _ERRORS.get(record["error_type"], AudioError)(record["error"]))
    probabilities = {label: float(probability) for label, probability in record["probabilities"].items()}
    if record["emotion"] not in probabilities:
        raise ValueError(f"has no probability of {record['emotion']!r}")
    return Prediction(utterance, record["emotion"], probabilities, record["audio_s"], record["elapsed_s"])


def _complaint(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"has no key {error}"
    return str(error) if str(error).startswith("has ") else f"has a wrong value ({error})"
