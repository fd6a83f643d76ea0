"""`BatchScorer`: what the loss needs of a host, which runs on audio or from cached activations."""

from collections.abc import Sequence
from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor

from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.labels import LabelSet
from mal_adapter.ser.recognizer.inputs import Prepared

__all__ = ["BatchScorer"]


class BatchScorer(Protocol):
    """Scores the labels for a batch of utterances, one per dialogue.

    `EmotionRecognizer` runs the whole host on the audio. `CachedHost` starts behind the hooked layer, from activations
    on disk. Both give the same loss and gradients, up to rounding.
    """

    @property
    def labels(self) -> LabelSet:
        """The possible answers, in the order of the columns of `log_probs`."""

    def prepare(self, utterances: Sequence[Utterance]) -> Prepared:
        """Make the inputs of a batch.

        Returns:
            The inputs, a row for each utterance whose audio can be used; a failure for each other one; and where audio
            is, for the session, if the inputs don't show it.
        """

    def log_probs(self, inputs: dict[str, Any]) -> Float[Tensor, "batch labels"]:
        """Run one forward within the open session, which reads and writes a dialogue per row.

        Args:
            inputs: Those of `prepare`.

        Returns:
            (batch, labels) log-probability of each label, not normalised over the labels; differentiable where autograd
            records.
        """
