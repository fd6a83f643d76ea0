"""A step of train_memory on the frozen host, beside a bare forward of the same utterances."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mal_adapter.ser.dialogue import Dialogue, Utterance
from mal_adapter.ser.labels import LabelSet
from mal_adapter.ser.recognizer.inputs import Prepared
from mal_adapter.ser.training import TrainingConfig
from mal_adapter.ser.training.step import Stepper
from mal_adapter.ser.training.trainable import Trainable
from tests.benchmarks.gpu.figures import Figure, share, short
from tests.benchmarks.gpu.world import Budget, World

__all__ = ["training"]

_LABELS = LabelSet(("angry", "happy", "neutral", "sad"))
_TARGETS = {1: 1.7, 4: 1.6}
_BEFORE = {1: "2.65 times", 4: "1.82 times"}


class RandomUtterances:
    """A `BatchScorer` of random prompts, made once and on the device: no sound files, no tokenizer.

    Args:
        model: The host.
        world: Makes the inputs.
    """

    labels = _LABELS

    def __init__(self, model: nn.Module, world: World) -> None:
        self._model = model
        self._inputs = cache(lambda batch, turn: world.inputs(batch, seed=turn))

    def prepare(self, utterances: Sequence[Utterance]) -> Prepared:
        """A row per utterance; those of one turn come together."""
        inputs = self._inputs(len(utterances), int(utterances[0].utterance_id))
        return Prepared(inputs, dict.fromkeys(range(len(utterances)), 10.0), {})

    def log_probs(self, inputs: dict[str, Any]) -> Tensor:
        """Of the labels, whose first tokens are the ids 1 to 4, after the last token of the prompt."""
        last: Tensor = self._model(**inputs).logits[:, -1]
        return last.float().log_softmax(-1)[:, 1 : 1 + len(_LABELS)]


def training(world: World, budget: Budget) -> Iterator[Figure]:
    """Forwards, backward and AdamW on dialogues of a few utterances, side by side."""
    trainable = Trainable(world.host, world.memory)
    before = trainable.copy_values()
    try:
        yield from _training(world, budget, trainable)
    finally:
        trainable.load_values(before)  # other sections continue dialogues of this adapter


def _training(world: World, budget: Budget, trainable: Trainable) -> Iterator[Figure]:
    scale, memory = world.scale, world.memory
    accelerator = Accelerator(cpu=not world.clock.cuda)
    ours, theirs = RandomUtterances(world.host, world), RandomUtterances(world.bare, world)
    for batch in scale.training:
        budget.check(f"batch {batch}")
        dialogues = [_dialogue(f"dialogue-{row}", scale.utterances) for row in range(batch)]
        config = TrainingConfig(side_by_side=batch, batch_size=batch)
        stepper = Stepper(ours, memory, trainable, dialogues, config, accelerator, 1000)
        turns = [[dialogue.utterances[turn] for dialogue in dialogues] for turn in range(scale.utterances)]

        def step(stepper=stepper, dialogues=dialogues) -> None:  # type: ignore[no-untyped-def]
            stepper.step(dialogues, {})

        def bare(turns=turns) -> None:  # type: ignore[no-untyped-def]
            with torch.no_grad():
                for utterances in turns:
                    theirs.log_probs(theirs.prepare(utterances).inputs)

        with trainable.frozen(), torch.enable_grad():
            steps, forwards = world.clock.interleaved(
                step, bare, seconds=world.seconds(6, budget), around=(nullcontext, nullcontext)
            )
        note = f"{short(median(steps))} and {short(median(forwards))} ms"
        name = f"training step of {scale.utterances} utterances / bare forwards of the same"
        before, target = _BEFORE.get(batch, ""), _TARGETS.get(batch)
        numbers = {"step_ms": steps, "bare_ms": forwards}
        yield Figure(name, f"batch {batch}", share(steps, forwards), "times", before, target, "≤", note, numbers)


def _dialogue(name: str, utterances: int) -> Dialogue:
    turns = (
        Utterance(name, str(turn), "AB"[turn % 2], f"{name}-{turn}.wav", emotion=_LABELS.names[turn % len(_LABELS)])
        for turn in range(utterances)
    )
    return Dialogue(name, tuple(turns))
