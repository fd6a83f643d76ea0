"""The loss of whole dialogues and its gradient, one window of utterances after the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from mal_adapter.errors import ConfigError, TrainingError
from mal_adapter.memory.transfer import to_device
from mal_adapter.ser.dialogue import Dialogue, Utterance
from mal_adapter.ser.labels import LabelSet
from mal_adapter.ser.training.batch_scorer import BatchScorer
from mal_adapter.ser.training.batches import Unusable, side_by_side

if TYPE_CHECKING:
    from mal_adapter.attach import AttachedMemory

__all__ = ["DialogueLoss", "Tally", "class_weights", "target_of"]


@dataclass(frozen=True)
class Tally:
    """Sums over one or more dialogues.

    Args:
        loss: Sum over labelled utterances of weight · cross-entropy.
        weight: Sum of their weights; `loss / weight` is the mean that torch's `cross_entropy` returns.
        utterances: Their number, labelled or not.

    Example:
        >>> Tally(2.0, 1.0, 3) + Tally(1.0, 2.0, 1)
        Tally(loss=3.0, weight=3.0, utterances=4)
    """

    loss: float = 0.0
    weight: float = 0.0
    utterances: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.loss + other.loss, self.weight + other.weight, self.utterances + other.utterances)


class DialogueLoss:
    """Run dialogues with the memory and add the gradient of their summed loss to the parameters' `grad`.

    The loss is summed, not averaged, so that a batch can be split over forwards and processes. The caller divides once
    by the weight of the whole batch.

    Args:
        scorer: The recogniser, or its cached host: the prompt and the label scores of recognition.
        memory: The recogniser's, in training mode.
        weights: (labels,) weight of each label in the loss.
        window: Utterances through which gradients flow back; None is the whole dialogue.
        backward: Called with the loss of each window.
        autocast: Makes the context in which forwards run.
    """

    def __init__(
        self,
        scorer: BatchScorer,
        memory: AttachedMemory,
        weights: Float[Tensor, " labels"],
        window: int | None,
        backward: Callable[[Float[Tensor, ""]], None],
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.scorer = scorer
        self.memory = memory
        self.weights = weights
        self.window = window
        self._device_weights = weights
        self._backward = backward
        self._autocast = autocast

    def __call__(self, dialogues: Sequence[Dialogue], unusable: Unusable) -> Tally:
        """Run `dialogues` side by side, from their first utterance.

        What is mutated: Gradients; `unusable`; the sessions of the dialogues, which are deleted at the end.

        Returns:
            The sums over `dialogues`.

        Raises:
            TrainingError: A loss is not finite; the message names the utterances.
        """
        total = Tally()
        turns = side_by_side(self.scorer, dialogues, unusable)
        ids = [dialogue.dialogue_id for dialogue in dialogues]
        self.memory.states.forget(ids)
        try:
            while (first := next(turns, None)) is not None:
                losses: list[_TurnLoss] = []
                # In training mode gradients flow within one session block; the next block starts from detached states.
                with self.memory.session(first.ids) as session:
                    rest = None if self.window is None else self.window - 1
                    for turn in itertools.chain((first,), itertools.islice(turns, rest)):
                        if tuple(turn.ids) != session.ids:
                            session.narrow(turn.ids)
                        session.audio_mask = turn.audio_mask
                        with self._autocast():
                            scores = self.scorer.log_probs(turn.inputs)
                        total += Tally(utterances=len(turn.utterances))
                        if (loss := self._loss(scores, turn.utterances)) is not None:
                            losses.append(loss)
                    if losses:
                        self._backward(torch.stack([loss.by_row.sum() for loss in losses]).sum())
                        total = sum(_tallies(losses), total)
        finally:
            self.memory.states.forget(ids)
        return total

    def _loss(self, scores: Float[Tensor, "batch labels"], utterances: Sequence[Utterance]) -> _TurnLoss | None:
        """The loss of one turn, with its graph; None if no utterance is labelled."""
        targets = [target_of(utterance, self.scorer.labels) for utterance in utterances]
        labelled = [row for row, target in enumerate(targets) if target is not None]
        if not labelled:
            return None
        target = torch.tensor([targets[row] for row in labelled])
        if len(labelled) < len(targets):
            scores = scores.index_select(0, to_device(torch.tensor(labelled), scores.device))
        if self._device_weights.device != scores.device:
            self._device_weights = to_device(self.weights, scores.device)
        on_device = to_device(target, scores.device)
        by_row = F.cross_entropy(scores.float(), on_device, self._device_weights, reduction="none")
        return _TurnLoss(by_row, self.weights[target].tolist(), [utterances[row] for row in labelled])


class _TurnLoss(NamedTuple):
    by_row: Float[Tensor, " labelled"]
    weights: list[float]
    utterances: list[Utterance]


def _tallies(losses: Sequence[_TurnLoss]) -> Iterator[Tally]:
    """The sums of each turn, read from the device at once, while it is at work on their backward.

    Raises:
        TrainingError: A loss is not finite.
    """
    values = iter(torch.cat([loss.by_row.detach() for loss in losses]).tolist())
    for _, weights, utterances in losses:
        by_row = list(itertools.islice(values, len(weights)))
        if lost := [u for u, value in zip(utterances, by_row, strict=True) if not math.isfinite(value)]:
            named = "; ".join(f"dialogue {u.dialogue_id}, utterance {u.utterance_id}" for u in lost)
            raise TrainingError(
                f"the loss is not finite at {named}. The adapter has its values from before this step; a lower "
                "learning_rate or max_grad_norm may help, or mixed_precision='no'"
            )
        # Summed in Python, in float64, which some devices lack.
        yield Tally(math.fsum(by_row), math.fsum(weights))


def target_of(utterance: Utterance, labels: LabelSet) -> int | None:
    """The index of the utterance's label; None if it has no label, or one outside of `labels`."""
    return labels.index(utterance.emotion) if utterance.emotion is not None and utterance.emotion in labels else None


def class_weights(
    given: str | Mapping[str, float] | None, dialogues: Sequence[Dialogue], labels: LabelSet
) -> Float[Tensor, " labels"]:
    """The weights of the labels in the loss.

    Args:
        given: As `TrainingConfig.class_weights`. "balanced" is scikit-learn's formula, utterances / (labels ·
            utterances with this label), over the labels that occur.
        dialogues: The training dialogues, for "balanced".
        labels: The label set.

    Returns:
        (labels,) float32.

    Raises:
        ConfigError: A weight is given for a name outside of `labels`, a label has two weights, or all weights are zero.

    Example:
        >>> class_weights({"sad": 2.0}, [], LabelSet(("neutral", "sad")))
        tensor([1., 2.])
    """
    weights = torch.ones(len(labels))
    if isinstance(given, Mapping):
        if unknown := [name for name in given if name not in labels]:
            raise ConfigError(f"class_weights has {unknown}, but the labels are {', '.join(labels)}")
        by_label: dict[str, float] = {}
        for name, weight in given.items():
            if by_label.setdefault(labels.lookup(name), weight) != weight:
                raise ConfigError(f"class_weights has two weights for the label {labels.lookup(name)!r}; give one")
            weights[labels.index(name)] = weight
        if not weights.any():
            raise ConfigError("class_weights are zero for every label, so there is nothing to learn")
    elif given == "balanced":
        targets = [target_of(utterance, labels) for dialogue in dialogues for utterance in dialogue.utterances]
        known = [target for target in targets if target is not None]
        present = np.unique(known)
        weights[torch.from_numpy(present)] = torch.from_numpy(
            compute_class_weight("balanced", classes=present, y=known)
        ).float()
    return weights
