"""Metrics on the dev dialogues, after each epoch of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence

from accelerate import Accelerator
from accelerate.utils import gather_object
from sklearn.metrics import f1_score

from mal_adapter.errors import LabelError
from mal_adapter.ser.dialogue import Dialogue
from mal_adapter.ser.progress import progress_bar
from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer
from mal_adapter.ser.recognizer.results import Prediction
from mal_adapter.ser.training.loss import target_of

__all__ = ["dev_scores"]


def dev_scores(
    recognizer: EmotionRecognizer, dialogues: Sequence[Dialogue], accelerator: Accelerator, side_by_side: int
) -> dict[str, float]:
    """Run the dev dialogues and score the answers; each process runs a share of them.

    Forwards run without autocast, as in recognition.

    What is mutated: The sessions of the dialogues that this process runs.

    Args:
        recognizer: With or without its memory.
        dialogues: The dev dialogues.
        accelerator: Joins the processes.
        side_by_side: Dialogues per forward and process, at most.

    Returns:
        `loss`, the mean of -log of the true label's probability; `weighted_f1`; and the number of `utterances`.

    Raises:
        LabelError: No utterance has usable audio and one of the labels.
    """
    labels = recognizer.labels
    own = dialogues[accelerator.process_index :: accelerator.num_processes]
    answers: list[tuple[int, int, float]] = []
    results = recognizer.recognize_many(own, side_by_side)
    total = sum(len(dialogue.utterances) for dialogue in own)
    shown = accelerator.is_main_process
    for result in progress_bar(results, desc="dev", total=total, unit="utterance", shown=shown, leave=False):
        target = target_of(result.utterance, labels)
        if isinstance(result, Prediction) and target is not None:
            probability = result.probabilities[labels.names[target]]
            answers.append((target, labels.index(result.label), -math.log(max(probability, 1e-30))))
    answers = gather_object(answers)
    if not answers:
        raise LabelError(
            f"no utterance of the dev dialogues has usable audio and one of the labels {', '.join(labels)}"
        )
    truth, predicted, losses = zip(*answers, strict=True)
    return {
        "loss": math.fsum(losses) / len(losses),  # the same in any order, so for any number of processes
        "weighted_f1": float(f1_score(truth, predicted, average="weighted", zero_division=0)),
        "utterances": len(answers),
    }
