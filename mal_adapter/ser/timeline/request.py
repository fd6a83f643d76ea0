"""A recording that is to be answered: its session, its channels, and its turns in order."""

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from mal_adapter.errors import TurnError
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.paths import existing_sound, file_name
from mal_adapter.ser.recognizer.audio import SoundInfo, sound_info
from mal_adapter.ser.recognizer.results import Failure, Prediction
from mal_adapter.ser.timeline.split import split_turn
from mal_adapter.ser.turns.overlaps import mark_overlaps, turns_within
from mal_adapter.ser.turns.turn import Turn, TurnSettings
from mal_adapter.stores.base import encode_session_id

__all__ = ["Recognizer", "Request", "Turns", "check_channels", "session_name", "turns_of"]

Turns = str | os.PathLike[str] | Iterable[Turn] | None
"""A file of turns, the turns, or None for voice activity."""

#: Turns by voice activity are no longer, even if the host accepts more: an emotion rarely lasts for half a minute.
LONGEST_S = 30.0
#: Seconds by which parts stay below the host's limit, for rounding to samples.
MARGIN_S = 0.01


class Recognizer(Protocol):
    """What `EmotionRecognizer` offers for a timeline."""

    memory: Any

    @property
    def reads_memory(self) -> bool: ...

    @property
    def sampling_rate(self) -> int: ...

    @property
    def longest_s(self) -> float: ...

    def without_memory(self) -> "Recognizer": ...

    def answer(
        self, utterances: Sequence[Utterance], *, session_ids: Sequence[str] | None = None
    ) -> list[Prediction | Failure]: ...


@dataclass(frozen=True, eq=False)
class Request:
    """A recording; the fields are the arguments of `EmotionRecognizer.timeline`."""

    path: str | os.PathLike[str]
    turns: Turns = None
    channels: Sequence[str] | None = None
    settings: TurnSettings | None = None
    session_id: str | None = None

    @property
    def session(self) -> str:
        """The id of the session."""
        return session_name(Path(self.path)) if self.session_id is None else self.session_id

    @property
    def recording(self) -> Path:
        """The sound file."""
        return existing_sound(Path(self.path))


def turns_of(recognizer: Recognizer, request: Request) -> Iterator[Turn]:
    """The turns of a recording in order of start, none longer than the host accepts. The recording is checked at once.

    Raises:
        AudioError, SessionError, TurnError: As `EmotionRecognizer.timeline`.
    """
    recording = request.recording
    info = sound_info(recording)
    if recognizer.reads_memory:
        encode_session_id(request.session)  # raises SessionError
    settings = request.settings or TurnSettings()
    return _turns(recognizer, recording, info, request.turns, request.channels, settings)


def session_name(recording: Path) -> str:
    """The id of a recording's session: its file's name without the suffix.

    Example:
        >>> session_name(Path("calls/call-42.wav"))
        'call-42'
    """
    return Path(file_name(recording)).stem


def check_channels(channels: Sequence[str], info: SoundInfo, recording: Path) -> tuple[str, ...]:
    """The names of a recording's channels, if there is one for each.

    Raises:
        TurnError: There are more or fewer names than channels, or two are the same.
    """
    names = tuple(channels)
    if isinstance(channels, str) or len(set(names)) != len(names) or not all(names):
        raise TurnError(f"channels must be different names, got {channels!r}")
    if len(names) != info.channels:
        raise TurnError(
            f"{recording} has {info.channels} channel{'s' if info.channels != 1 else ''}, and {len(names)} "
            f"{'names are' if len(names) != 1 else 'name is'} given: {', '.join(names)}; give one name per channel, or "
            "none"
        )
    return names


def _turns(
    recognizer: Recognizer,
    recording: Path,
    info: SoundInfo,
    turns: Turns,
    channels: Sequence[str] | None,
    settings: TurnSettings,
) -> Iterator[Turn]:
    if turns is None:
        from mal_adapter.ser.turns.detect import find_turns

        longest_s = LONGEST_S if settings.max_s is None else settings.max_s
        return find_turns(recording, channels, settings, min(longest_s, recognizer.longest_s - MARGIN_S))
    names = None if channels is None else check_channels(channels, info, recording)
    if isinstance(turns, (str, os.PathLike)):
        from mal_adapter.ser.turns.files import read_turns

        turns = read_turns(turns, channels=names)
    placed = (_placed(turn, names, info) for turn in turns)
    in_order = _in_order(placed)
    if isinstance(turns, Collection):
        try:
            in_order = iter(mark_overlaps(turns_within(list(placed), info.duration_s)))
        except TurnError as error:
            raise TurnError(f"{recording}: {error}") from error
    return _not_too_long(recognizer, recording, in_order, settings.max_s)


def _placed(turn: Turn, names: tuple[str, ...] | None, info: SoundInfo) -> Turn:
    """The turn in the channel that its speaker has."""
    if not isinstance(turn, Turn):
        raise TurnError(f"expected turns or a file of turns, got a {type(turn).__name__}: {turn!r}")
    if turn.channel is not None and turn.channel >= info.channels:
        raise TurnError(
            f"the turn of {turn.speaker!r} at {turn.start_s} s is in channel {turn.channel}, and the recording has "
            f"{info.channels}, counted from 0"
        )
    if turn.channel is None and names is not None and turn.speaker in names:
        return replace(turn, channel=names.index(turn.speaker))
    return turn


def _in_order(turns: Iterable[Turn]) -> Iterator[Turn]:
    """Turns that nobody has yet; only what comes can be checked."""
    last_s = 0.0
    for turn in turns:
        if turn.start_s < last_s:
            raise TurnError(
                f"the turn of {turn.speaker!r} at {turn.start_s} s comes after one at {last_s} s; give the turns in "
                "order of start, or as a list"
            )
        last_s = turn.start_s
        yield turn


def _not_too_long(
    recognizer: Recognizer, recording: Path, turns: Iterable[Turn], longest_s: float | None
) -> Iterator[Turn]:
    rate = recognizer.sampling_rate
    max_s = recognizer.longest_s if longest_s is None else min(longest_s, recognizer.longest_s)
    for turn in turns:
        if round(turn.end_s * rate) - round(turn.start_s * rate) > round(max_s * rate):
            yield from split_turn(turn, recording, max_s - MARGIN_S)
        else:
            yield turn
