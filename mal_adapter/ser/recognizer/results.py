"""What a recogniser answers to an utterance."""

from dataclasses import dataclass, field

from mal_adapter.errors import AudioError
from mal_adapter.ser.dialogue import Utterance

__all__ = ["Failure", "Prediction"]


@dataclass(frozen=True)
class Prediction:
    """The answer to one utterance.

    Args:
        utterance: What was heard.
        label: The most probable label.
        probabilities: Label -> probability, in the order of the label set; they sum to 1.
        audio_s: How long the utterance is, in seconds.
        elapsed_s: From opening the file to the answer, in seconds; for a batch, of the whole batch.
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
        utterance: What was asked for.
        error: Why not; its message names the file and says what to do.
    """

    utterance: Utterance
    error: AudioError
