"""Evaluations made by hand, so that every figure of their report is known."""

import dataclasses
from typing import Any

import torch

from mal_adapter import MemoryAdapter
from mal_adapter.ser.evaluation import Evaluation
from mal_adapter.ser.evaluation.arms import ARMS

__all__ = ["LABELS", "RIGHT", "RUN", "made_evaluation", "make_control"]

LABELS = ["neutral", "sad"]
RUN = {
    "format_version": 1, "host": "org/host", "model_type": "qwen2_audio", "memory": {"depth": 2}, "layer_idx": 1,
    "fingerprint": "0123", "labels": LABELS, "prompt": "How do they feel?", "arms": list(ARMS), "history": 3, "seed": 0,
    "dialogues": "ab", "versions": {"torch": "2.13.0"},
}  # fmt: skip
#: Per arm, which of the four turns of each dialogue are right.
RIGHT = {
    "host_only": "1010",
    "control": "1010",
    "own": "1111",
    "reset": "1010",
    "swapped": "1000",
    "other_dialogues": "1010",
    "shuffled": "1110",
    "oracle_speakers": "1111",
    "history": "0000",
}


def made_evaluation(name: str = "calls", dialogues: int = 12, first: int = 0, **changes: Any) -> Evaluation:
    """`dialogues` dialogues of four turns, numbered from `first`; `changes` are entries of `run`."""
    run = {**RUN, **changes}
    rows = []
    for number in range(first, first + dialogues):
        for turn in range(4):
            truth = LABELS[(number + turn) % 2]
            arms = {}
            for arm in run["arms"]:
                sure = 0.6 + 0.05 * turn
                p = sure if RIGHT[arm][turn] == "1" else 1 - sure
                arms[arm] = {label: p if label == truth else 1 - p for label in LABELS}
            rows.append(
                {
                    "dialogue_id": f"d{number}", "utterance_id": str(turn), "turn": turn + 1, "speaker": "AB"[turn % 2],
                    "truth": truth, "arms": arms, "surprise": 1.0 / (turn + 1),
                }
            )  # fmt: skip
    return Evaluation(name, run, rows)


def make_control(memory: MemoryAdapter, **changes: Any) -> MemoryAdapter:
    """An untrained control of a memory, whose random parameters change the answers."""
    torch.manual_seed(5)
    control = MemoryAdapter(dataclasses.replace(memory.config, **{"update": "none", **changes})).eval()
    with torch.no_grad():
        for parameter in control.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    control.metadata = memory.metadata
    return control
