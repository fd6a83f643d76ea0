"""The loss of whole dialogues and its gradient, window by window."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from mal_adapter.errors import ConfigError, TrainingError
from mal_adapter.ser.activations import CachedHost
from mal_adapter.ser.batches import Unusable, side_by_side
from mal_adapter.ser.dialogue import Dialogue, Utterance
from mal_adapter.ser.labels import LabelSet
from mal_adapter.ser.recognizer import EmotionRecognizer

if TYPE_CHECKING:
    from mal_adapter.attach import AttachedMemory

__all__ = ["DialogueLoss", "Tally", "class_weights", "target_of"]


@dataclass(frozen=True)
class Tally:
    """What one or more dialogues came to.

    Args:
        loss: the sum over labelled utterances of weight · cross-entropy.
        weight: the sum of their weights; `loss / weight` is the mean that torch's `cross_entropy` returns.
        heard: utterances, labelled or not.
    """

    loss: float = 0.0
    weight: float = 0.0
    heard: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.loss + other.loss, self.weight + other.weight, self.heard + other.heard)


class DialogueLoss:
    """Hears dialogues with the memory and adds the gradient of their summed loss to the parameters' `grad`.

    Summed, not averaged: so that batches of dialogues of any length can be split over forwards and processes, and be
    divided once by the weight of all.

    Args:
        recognizer: in training as in recognition: the same prompt, the same scores of the labels; or its cached host.
        memory: the recognizer's, in training mode.
        weights: (labels,) what each label's utterances count.
        window: utterances through which gradients flow back; None is the whole dialogue.
        backward: called with each window's loss.
        autocast: makes the context of the forwards.
    """

    def __init__(
        self,
        recognizer: EmotionRecognizer | CachedHost,
        memory: AttachedMemory,
        weights: Float[Tensor, " labels"],
        window: int | None,
        backward: Callable[[Float[Tensor, ""]], None],
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.recognizer = recognizer
        self.memory = memory
        self.weights = weights
        self.window = window
        self._backward = backward
        self._autocast = autocast

    def __call__(self, dialogues: Sequence[Dialogue], unusable: Unusable) -> Tally:
        """Hears `dialogues` side by side, from their start.

        What is mutated: gradients; `unusable`; the dialogues' sessions, which are forgotten at the end.

        Raises:
            TrainingError: a loss is not finite; the message names the utterances.
        """
        total = Tally()
        turns = side_by_side(self.recognizer, dialogues, unusable)
        ids = [dialogue.dialogue_id for dialogue in dialogues]
        self.memory.states.forget(ids)
        try:
            while (first := next(turns, None)) is not None:
                losses: list[Tensor] = []
                # In training mode gradients flow through one block; the next one begins with detached states.
                with self.memory.session(first.ids) as session:
                    rest = None if self.window is None else self.window - 1
                    for turn in itertools.chain((first,), itertools.islice(turns, rest)):
                        if tuple(turn.ids) != session.ids:
                            session.narrow(turn.ids)
                        session.audio_mask = turn.audio_mask
                        with self._autocast():
                            scores = self.recognizer.log_probs(turn.inputs)
                        tally = self._add_losses(scores, turn.utterances, losses)
                        total += tally
                    if losses:
                        self._backward(torch.stack(losses).sum())
        finally:
            self.memory.states.forget(ids)
        return total

    def _add_losses(
        self, scores: Float[Tensor, "batch labels"], utterances: Sequence[Utterance], losses: list[Float[Tensor, ""]]
    ) -> Tally:
        targets = [target_of(utterance, self.recognizer.labels) for utterance in utterances]
        labelled = [row for row, target in enumerate(targets) if target is not None]
        if not labelled:
            return Tally(heard=len(utterances))
        target = torch.tensor([targets[row] for row in labelled], device=scores.device)
        weight = self.weights.to(scores.device)
        by_row = F.cross_entropy(scores[labelled].float(), target, weight, reduction="none")
        if not by_row.isfinite().all():
            lost = [
                utterances[row] for row, value in zip(labelled, by_row.tolist(), strict=True) if not np.isfinite(value)
            ]
            named = "; ".join(f"dialogue {u.dialogue_id}, utterance {u.utterance_id}" for u in lost)
            raise TrainingError(
                f"the loss is not finite at {named}. The adapter is as before this step; a lower learning_rate or "
                "max_grad_norm may help, or mixed_precision='no'"
            )
        losses.append(by_row.sum())
        # Summed on the host, in float64, which not every device has.
        return Tally(math.fsum(by_row.tolist()), math.fsum(weight[target].tolist()), len(utterances))


def target_of(utterance: Utterance, labels: LabelSet) -> int | None:
    """The index of the utterance's label; None where it has none, or one outside of `labels`."""
    return labels.index(utterance.emotion) if utterance.emotion is not None and utterance.emotion in labels else None


def class_weights(
    given: str | Mapping[str, float] | None, dialogues: Sequence[Dialogue], labels: LabelSet
) -> Float[Tensor, " labels"]:
    """The float32 weights of the loss. "balanced" is scikit-learn's: utterances / (labels · utterances of this
    label).

    Raises:
        ConfigError: a weight is given for what is no label, or every label's weight is zero.
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
            raise ConfigError("class_weights are zero for every label, so that there is nothing to learn")
    elif given == "balanced":
        targets = [target_of(utterance, labels) for dialogue in dialogues for utterance in dialogue.utterances]
        known = [target for target in targets if target is not None]
        present = np.unique(known)
        weights[torch.from_numpy(present)] = torch.from_numpy(
            compute_class_weight("balanced", classes=present, y=known)
        ).float()
    return weights
