"""One step of the optimizer on a batch of dialogues, shared by any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from mal_adapter.errors import TrainingError
from mal_adapter.memory.precision import wide_tensor
from mal_adapter.ser.dialogue import Dialogue
from mal_adapter.ser.training.batch_scorer import BatchScorer
from mal_adapter.ser.training.batches import Unusable
from mal_adapter.ser.training.config import TrainingConfig
from mal_adapter.ser.training.loss import DialogueLoss, Tally, class_weights
from mal_adapter.ser.training.trainable import Trainable

if TYPE_CHECKING:
    from mal_adapter.attach import AttachedMemory

__all__ = ["Stepper"]


class Stepper:
    """AdamW on the gradient of the mean loss of a batch; each process runs a share of its dialogues.

    Gradients are summed over processes and divided by the weight of all labelled utterances. So the result doesn't
    depend on how dialogues are distributed, up to rounding.

    What is mutated: `step` changes the trainable parameters and random states.

    Args:
        scorer: The recogniser, or its cached host.
        memory: The recogniser's.
        trainable: The parameters to train.
        dialogues: All training dialogues, for "balanced" class weights.
        config: The settings of the run.
        accelerator: Joins the processes.
        total_steps: Of the whole training, for the schedule.

    Attributes:
        optimizer: AdamW with one parameter group.
        steps_done: Number of steps so far.
    """

    def __init__(
        self,
        scorer: BatchScorer,
        memory: AttachedMemory,
        trainable: Trainable,
        dialogues: Sequence[Dialogue],
        config: TrainingConfig,
        accelerator: Accelerator,
        total_steps: int,
    ) -> None:
        self._config, self._accelerator, self._trainable = config, accelerator, trainable
        self._parameters = list(trainable.parameters.values())
        weights = class_weights(config.class_weights, dialogues, scorer.labels)
        backward, autocast = accelerator.backward, accelerator.autocast
        self._loss = DialogueLoss(scorer, memory, weights, config.window, backward, autocast)
        self.optimizer = torch.optim.AdamW(self._parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        self._total_steps = total_steps
        self.start(0)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(self._schedule.get_last_lr()[0])

    def start(self, steps_done: int) -> None:
        """Start the schedule after `steps_done` steps; the learning rate depends on nothing else."""
        self.steps_done = steps_done
        warmup = round(self._config.warmup * self._total_steps)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = self._config.learning_rate
        if self._config.schedule == "cosine":
            self._schedule = get_cosine_schedule_with_warmup(
                self.optimizer, warmup, self._total_steps, last_epoch=steps_done - 1
            )
        else:
            self._schedule = get_constant_schedule_with_warmup(self.optimizer, warmup, last_epoch=steps_done - 1)

    def step(self, dialogues: Sequence[Dialogue], unusable: Unusable) -> Tally:
        """Take one step on `dialogues`, the batch of all processes.

        What is mutated: Parameters, optimizer and random states; `unusable` gets the utterances whose audio can't be
        used.

        Returns:
            The sums over all processes.

        Raises:
            TrainingError: A loss or the gradient is not finite. Parameters and optimizer are unchanged.
        """
        here = self._accelerator
        # The seed depends on the step alone, so a resumed run has the same random numbers as an uninterrupted one.
        set_seed(((self._config.seed * 1_000_003 + self.steps_done) * here.num_processes + here.process_index) % 2**31)
        self._trainable.train()
        self.optimizer.zero_grad()
        own = dialogues[here.process_index :: here.num_processes]
        tally = Tally()
        for start in range(0, len(own), self._config.side_by_side):
            tally += self._loss(own[start : start + self._config.side_by_side], unusable)
        self._trainable.train(False)
        tally = self._join_processes(tally)
        if tally.weight:
            norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm)
            if not norm.isfinite():
                named = ", ".join(dialogue.dialogue_id for dialogue in dialogues)
                raise TrainingError(
                    f"the gradient is not finite after the dialogues {named}. The adapter has its values from before "
                    "this step; a lower learning_rate or a shorter window may help"
                )
            self.optimizer.step()
        self._schedule.step()
        self.steps_done += 1
        return tally

    def _join_processes(self, tally: Tally) -> Tally:
        """Sum `tally` over all processes and turn the gradients into those of the mean loss.

        A parameter without a gradient gets zeros, so that all processes reduce the same parameters.
        """
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        if self._accelerator.num_processes > 1:
            # As one tensor, since each reduction costs a round trip.
            joined = self._accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
            gradients = [
                piece.view_as(p)
                for p, piece in zip(self._parameters, joined.split([p.numel() for p in self._parameters]), strict=True)
            ]
            sums = wide_tensor([tally.loss, tally.weight, tally.utterances], joined.device)
            tally = Tally(*self._accelerator.reduce(sums, "sum").tolist())
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient / (tally.weight or 1)
        return tally
