"""`Answerer`: one forward for utterances of several sessions, and an answer or an error for each of them."""

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from mal_adapter.attach import AttachedMemory
from mal_adapter.errors import MalAdapterError, StoreError
from mal_adapter.memory.state import MemoryState
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.recognizer.audio import Waveform
from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer
from mal_adapter.ser.recognizer.results import Continuation, Failure, Prediction
from mal_adapter.server.refusals import Refusal

__all__ = ["Answer", "Answerer", "Turn"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turn:
    """An utterance to process: the store's id of its session, and its sound: a file, or samples at the host's rate."""

    stored_id: str
    path: Path
    waveform: Waveform | None = None


@dataclass(frozen=True)
class Answer:
    """The answer to a turn. Its state is kept; `saved` tells whether the store has it."""

    prediction: Prediction
    utterance: int
    saved: bool
    elapsed_s: float
    batch: int


class Answerer:
    """Answers batches of turns; the batches of several threads run one at a time in the model.

    What is mutated: a session changes only if its turn is answered. Each session is opened, checked and saved on its
    own, so that a damaged state, a conflict or an outage of the store is an error of that session only.

    Args:
        recognizer: With a memory.
        memory: The recogniser's.
    """

    def __init__(self, recognizer: EmotionRecognizer, memory: AttachedMemory) -> None:
        self._recognizer = recognizer
        self._memory = memory
        self._host = threading.Lock()

    def __call__(self, turns: Sequence[Turn]) -> list[Answer | Exception]:
        """An answer or an error per turn, in their order. The turns are of different sessions."""
        started = time.perf_counter()
        outcomes: dict[int, Answer | Exception] = {}
        opened: dict[int, tuple[ExitStack, MemoryState | None]] = {}
        try:
            for index, turn in enumerate(turns):
                try:
                    opened[index] = self._open(turn.stored_id)
                except Exception as error:
                    outcomes[index] = error
            ready = [turns[index] for index in opened]
            results = self._forward(ready, [state for _, state in opened.values()]) if ready else []
            elapsed_s = time.perf_counter() - started
            for index, result in zip(list(opened), results, strict=True):
                block, before = opened.pop(index)
                try:
                    prediction, state = _answered(turns[index], result)
                    saved = self._save(turns[index].stored_id, state, block)
                    utterance = 1 if before is None else 1 + int(before.utterances)
                    outcomes[index] = Answer(prediction, utterance, saved, elapsed_s, len(turns))
                except Exception as error:
                    outcomes[index] = error
                finally:
                    _close(block)
        finally:
            for block, _ in opened.values():
                _close(block)
        return [outcomes[index] for index in range(len(turns))]

    def _open(self, stored_id: str) -> tuple[ExitStack, MemoryState | None]:
        """(What closes the session, its state)."""
        with ExitStack() as block:
            state = block.enter_context(self._memory.states.opened([stored_id])).get(stored_id)
            if state is not None:
                self._memory.adapter.check_state(state)
            return block.pop_all(), state

    def _forward(self, turns: Sequence[Turn], states: Sequence[MemoryState | None]) -> list[Continuation | Exception]:
        utterances = [Utterance(turn.stored_id, "0", "?", turn.path) for turn in turns]
        try:
            prepared = self._recognizer.prepare(utterances, [turn.waveform for turn in turns])
            with self._host:
                return list(self._recognizer.answer_from(utterances, states, prepared))
        except Exception as error:
            if len(turns) == 1:
                return [error]
            log.warning("a batch of %d fails, so its utterances are processed one by one: %s", len(turns), error)
        # Nothing is saved yet, so each one may be processed again.
        pairs = zip(turns, states, strict=True)
        return [result for turn, state in pairs for result in self._forward([turn], [state])]

    def _save(self, stored_id: str, state: MemoryState, block: ExitStack) -> bool:
        """Save a state and close its session. Returns whether the store has it."""
        states = self._memory.states
        states.keep({stored_id: state})
        with suppress(StoreError):  # the host has answered, and the state is in the backlog
            block.close()  # tries again to save what could not be saved
        return stored_id not in states.backlog


def _close(block: ExitStack) -> None:
    """Close the session of a turn that has its outcome already."""
    try:
        block.close()
    except MalAdapterError as error:  # of an older state of this session, which is still unsaved
        log.warning("%s: %s", type(error).__name__, error)


def _answered(turn: Turn, result: Continuation | Exception) -> tuple[Prediction, MemoryState]:
    """(The answer, the state after it).

    Raises:
        Refusal: 422 if the audio is unusable.
        Exception: The error of the forward.
    """
    if isinstance(result, Exception):
        raise result
    if isinstance(result.result, Failure):
        raise Refusal(422, "bad_audio", str(result.result.error).removeprefix(f"{turn.path}: "))
    if not isinstance(result.result, Prediction):
        raise result.result
    assert result.state is not None
    return result.result, result.state
