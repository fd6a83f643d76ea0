"""What a training run leaves beside the weights: the adapter's metadata, and `training.json`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mal_adapter.ser.dialogue import Dialogue
from mal_adapter.ser.labels import LabelSet
from mal_adapter.ser.provenance import versions
from mal_adapter.ser.training.checkpoint import Progress
from mal_adapter.serialization.metadata import AdapterMetadata

__all__ = ["described", "report_of"]


def report_of(progress: Progress, dialogues: Sequence[Dialogue], labels: LabelSet, processes: int) -> dict[str, Any]:
    """What `training.json` says of a run that has ended; plain JSON values."""
    emotions = [utterance.emotion for dialogue in dialogues for utterance in dialogue.utterances]
    return {
        **progress.run,
        "processes": processes,
        "train": {
            "dialogues": len(dialogues),
            "utterances": len(emotions),
            "labels": dict(Counter(labels.lookup(e) for e in emotions if e is not None and e in labels)),
            "not_judged": dict(Counter("" if e is None else e for e in emotions if e is None or e not in labels)),
        },
        "host_dev": progress.host_dev,
        "epochs": progress.history,
        "best_epoch": progress.best_epoch,
        "left_out": progress.unusable,
        "versions": versions(),
    }


def described(
    metadata: AdapterMetadata,
    labels: LabelSet,
    prompt: str,
    report: dict[str, Any],
    training_data: str | None,
    datasets: Sequence[str],
) -> AdapterMetadata:
    """The card of an adapter that was trained to answer `prompt` with one of `labels`."""
    metadata = metadata.with_task(labels.names, prompt)
    if labels.aliases:
        metadata = dataclasses.replace(metadata, task={**(metadata.task or {}), "aliases": dict(labels.aliases)})
    counts = report["train"]
    judged = ", ".join(f"{count} {name}" for name, count in counts["labels"].items())
    words = training_data or f"{counts['dialogues']} dialogues of {counts['utterances']} utterances: {judged}."
    return dataclasses.replace(metadata, training_data=words, datasets=list(datasets) or None)
