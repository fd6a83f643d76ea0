"""What a recogniser returns for an utterance."""

from dataclasses import dataclass, field
from typing import NamedTuple

from mal_adapter.errors import AudioError, HostError
from mal_adapter.memory.state import MemoryState
from mal_adapter.ser.dialogue import Utterance

__all__ = ["Continuation", "Failure", "Prediction"]


@dataclass(frozen=True)
class Prediction:
    """The answer to one utterance.

    Args:
        utterance: The utterance that was processed.
        label: The most probable label.
        probabilities: Label -> probability, in the order of the label set; they sum to 1.
        audio_s: The length of the utterance in seconds.
        elapsed_s: The time from opening the file to the answer, in seconds; in a batch, that of the whole batch.
    """

    utterance: Utterance
    label: str
    probabilities: dict[str, float] = field(hash=False)
    audio_s: float
    elapsed_s: float


@dataclass(frozen=True)
class Failure:
    """An utterance whose audio is unusable. Nothing of it is written to the memory.

    Args:
        utterance: The utterance.
        error: The reason. Its message names the file and says what to do.
    """

    utterance: Utterance
    error: AudioError


class Continuation(NamedTuple):
    """What `EmotionRecognizer.answer_from` returns for an utterance.

    Attributes:
        result: The answer; a `Failure` if the audio is unusable, a `HostError` if the host's answer is NaN.
        state: The dialogue's state after the utterance; None unless it is answered.
    """

    result: Prediction | Failure | HostError
    state: MemoryState | None
