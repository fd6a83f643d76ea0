"""Make timelines: answer the turns of a recording in the order of their starts, or of several side by side."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mal_adapter.errors import MalAdapterError
from mal_adapter.memory.config import check_integer
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.recognizer.results import Failure, Prediction
from mal_adapter.ser.timeline.request import Recognizer, Request, turns_of
from mal_adapter.ser.timeline.timeline import TimelineEntry
from mal_adapter.ser.turns.turn import Turn

__all__ = ["make_timeline", "make_timelines"]

#: The most turns that the plain host answers in one forward. The first come one by one, so that nobody waits.
PLAIN_ROWS = 8

Found = TimelineEntry | MalAdapterError | None


def make_timeline(recognizer: Recognizer, request: Request, *, compare: bool = True) -> Iterator[TimelineEntry]:
    """Answer the turns of a recording, as `EmotionRecognizer.timeline` says."""
    recording = _Recording(recognizer, request)
    return _entries(recognizer, recording, compare=compare)


def _entries(recognizer: Recognizer, recording: "_Recording", *, compare: bool) -> Iterator[TimelineEntry]:
    if recognizer.reads_memory:
        recognizer.memory.states.forget([recording.session])
    while not recording.over:
        for _, entry in _answer_next(recognizer, [recording], compare=compare):
            yield entry
    if recording.error is not None:
        raise recording.error


def make_timelines(
    recognizer: Recognizer, requests: Sequence[Request], *, compare: bool = True, batch_size: int = 8
) -> Iterator[tuple[Request, Found]]:
    """Answer several recordings side by side: one forward runs the next turn of each. The answers are those of
    `make_timeline`, sooner.

    What is mutated: the session of each recording starts empty, and is dropped at the end of the recording.

    Args:
        recognizer: The recogniser.
        requests: The recordings. Of those with the same session, one is processed after the other.
        compare: As for `EmotionRecognizer.timeline`.
        batch_size: How many recordings are processed at once.

    Yields:
        A recording and its next entry; or None after its last one, or the error that has ended it. The recordings
        alternate.

    Raises:
        ConfigError: `batch_size` is not an integer of at least 1.
        HostError, SessionError, SessionConflictError, StoreError: As `EmotionRecognizer.answer`.
    """
    check_integer("batch_size", batch_size, 1)
    return _several(recognizer, list(requests), compare=compare, batch_size=batch_size)


def _several(
    recognizer: Recognizer, waiting: list[Request], *, compare: bool, batch_size: int
) -> Iterator[tuple[Request, Found]]:
    active: list[_Recording] = []
    while True:
        running = {recording.session for recording in active}
        for request in list(waiting):
            if len(active) < batch_size and request.session not in running:
                waiting.remove(request)
                try:
                    active.append(_Recording(recognizer, request))
                except MalAdapterError as error:
                    yield request, error
                    continue
                running.add(request.session)
                if recognizer.reads_memory:
                    recognizer.memory.states.forget([request.session])
        if not active:
            return
        for recording, entry in _answer_next(recognizer, active, compare=compare):
            yield recording.request, entry
        for recording in active:
            if recording.over:
                if recognizer.reads_memory:  # the sessions of thousands of calls would fill the main memory
                    recognizer.memory.states.forget([recording.session])
                yield recording.request, recording.error
        active = [recording for recording in active if not recording.over]


class _Ready(NamedTuple):
    """A turn that is next, with the plain host's answer if that is known already."""

    turn: Turn
    utterance: Utterance
    plain: Prediction | Failure | None


class _Recording:
    """A recording that is being answered."""

    def __init__(self, recognizer: Recognizer, request: Request) -> None:
        self.request = request
        self.session = request.session
        self.ready: deque[_Ready] = deque()
        self.error: MalAdapterError | None = None
        self._path = request.recording
        self._turns = turns_of(recognizer, request)
        self._taken = 0
        self._ahead = 1
        self._ended = False

    @property
    def over(self) -> bool:
        """Whether all turns are answered, or all before an error."""
        return self._ended and not self.ready

    def take(self, most: int) -> list[tuple[Turn, Utterance]]:
        """The next turns: at first one, later more at once, but no more than `most`."""
        taken: list[tuple[Turn, Utterance]] = []
        while len(taken) < min(self._ahead, most) and not self._ended:
            try:
                turn = next(self._turns, None)
            except MalAdapterError as error:  # in the middle of a damaged file
                self.error, turn = error, None
            if turn is None:
                self._ended = True
            else:
                taken.append((turn, self._utterance(turn)))
        self._ahead *= 2
        return taken

    def _utterance(self, turn: Turn) -> Utterance:
        self._taken += 1
        return Utterance(
            self.session, f"{self._taken - 1:04d}", turn.speaker, self._path, turn.start_s, turn.end_s, turn.text,
            turn.emotion, turn.channel,
        )  # fmt: skip


def _answer_next(
    recognizer: Recognizer, active: Sequence[_Recording], *, compare: bool
) -> Iterator[tuple[_Recording, TimelineEntry]]:
    """Answer the next turn of each recording, and those before it that can't be answered."""
    remembers = recognizer.reads_memory
    _make_ready(recognizer, active, plain=compare or not remembers)
    heads: list[tuple[_Recording, _Ready]] = []
    for recording in active:
        while recording.ready:
            head = recording.ready.popleft()
            if head.plain is not None and (isinstance(head.plain, Failure) or not remembers):
                yield recording, TimelineEntry(head.turn, head.plain)
                continue
            heads.append((recording, head))
            break
    if heads:
        answers = recognizer.answer([head.utterance for _, head in heads])
        for (recording, head), answer in zip(heads, answers, strict=True):
            plain = None if isinstance(answer, Failure) else head.plain
            yield recording, TimelineEntry(head.turn, answer, plain)


def _make_ready(recognizer: Recognizer, active: Sequence[_Recording], *, plain: bool) -> None:
    """Take the next turns of the recordings that have none ready; where `plain`, with the answers of the plain host,
    for which the turns are independent of each other."""
    most = max(1, PLAIN_ROWS // len(active)) if plain else 1
    taken = [(recording, *one) for recording in active if not recording.ready for one in recording.take(most)]
    answers: Sequence[Prediction | Failure | None] = [None] * len(taken)
    if plain and taken:
        alone = recognizer.without_memory() if recognizer.reads_memory else recognizer
        # The ids only have to differ: nothing is read or written.
        answers = alone.answer([utterance for _, _, utterance in taken], session_ids=list(map(str, range(len(taken)))))
    for (recording, turn, utterance), answer in zip(taken, answers, strict=True):
        recording.ready.append(_Ready(turn, utterance, answer))
