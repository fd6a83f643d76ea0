"""How well dev dialogues are answered, between the epochs of a training."""

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
    """`loss`, the mean of -log of the truth's probability; `weighted_f1`; and the number of `utterances`.

    Each process hears a part of the dialogues, without autocast, as they will be heard.

    What is mutated: the sessions of the dialogues that this process hears.

    Raises:
        LabelError: no utterance can be heard and has one of the labels.
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
        raise LabelError(f"no utterance of the dev dialogues can be heard and has one of {', '.join(labels)}")
    truth, predicted, losses = zip(*answers, strict=True)
    return {
        "loss": math.fsum(losses) / len(losses),  # in any order the same, for any number of processes
        "weighted_f1": float(f1_score(truth, predicted, average="weighted", zero_division=0)),
        "utterances": len(answers),
    }
