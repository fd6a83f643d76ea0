"""What a recogniser answers to an utterance."""

from dataclasses import dataclass, field

from mal_adapter.errors import AudioError
from mal_adapter.ser.dialogue import Utterance

__all__ = ["Failure", "Prediction"]


@dataclass(frozen=True)
class Prediction:
    """The answer to one utterance.

    Args:
        utterance: what was heard.
        label: the most probable label.
        probabilities: label -> probability, in the order of the label set; they sum to 1.
        audio_s: how long the utterance is, in seconds.
        elapsed_s: from opening the file to the answer, in seconds; for a batch, of the whole batch.
    """

    utterance: Utterance
    label: str
    probabilities: dict[str, float] = field(hash=False)
    audio_s: float
    elapsed_s: float


@dataclass(frozen=True)
class Failure:
    """An utterance that could not be heard. The memory is as if it had not been there.

    Args:
        utterance: what was asked for.
        error: why not; its message names the file and says what to do.
    """

    utterance: Utterance
    error: AudioError
