"""A recogniser whose host starts behind the memory's layer, from cached activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.recognizer.audio import Waveform
from mal_adapter.ser.recognizer.inputs import Prepared
from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer
from mal_adapter.ser.training.cached_host import CachedHost

__all__ = ["CachedRecognizer"]


class CachedRecognizer(EmotionRecognizer):
    """The same recogniser, faster on utterances that a `CachedHost` has kept. Its answers are equal up to rounding.

    A batch with another utterance runs the whole host. The length of the audio is not kept, so that
    `Prediction.audio_s` is NaN.

    Args:
        recognizer: With a memory, and labels of one token each.
        cached: Of this recogniser. An utterance that `CachedHost.keep` could not use is a failure here too.
    """

    def __init__(self, recognizer: EmotionRecognizer, cached: CachedHost) -> None:
        self.__dict__.update(recognizer.__dict__)  # not the constructor, which tries the processor again
        self._cached = cached

    def prepare(self, utterances: Sequence[Utterance], waveforms: Sequence[Waveform | None] | None = None) -> Prepared:
        """As `CachedHost.prepare` if it has all of them, and no waveforms are given."""
        if waveforms is None and all(map(self._cached.has, utterances)):
            return self._cached.prepare(utterances)
        return super().prepare(utterances, waveforms)

    def log_probs(self, inputs: dict[str, Any]) -> Float[Tensor, "batch labels"]:
        """As `CachedHost.log_probs` for the inputs that it has prepared."""
        return self._cached.log_probs(inputs) if "hidden" in inputs else super().log_probs(inputs)
