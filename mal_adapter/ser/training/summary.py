"""The results of a training run besides the weights: `training.json`, and the adapter's metadata."""

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

__all__ = ["trained_metadata", "training_report"]


def training_report(
    progress: Progress, dialogues: Sequence[Dialogue], labels: LabelSet, processes: int
) -> dict[str, Any]:
    """Make the content of `training.json` after a finished run.

    Args:
        progress: Of the finished run.
        dialogues: The training dialogues.
        labels: The label set.
        processes: How many processes trained.

    Returns:
        Plain JSON values.
    """
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


def trained_metadata(
    metadata: AdapterMetadata,
    labels: LabelSet,
    prompt: str,
    report: dict[str, Any],
    training_data: str | None,
    datasets: Sequence[str],
) -> AdapterMetadata:
    """Add task, training data and data sets to an adapter's metadata.

    Args:
        metadata: Of the adapter; it is not changed.
        labels: The answers that the adapter was trained for.
        prompt: The question that it was trained with.
        report: As `training_report` makes it.
        training_data: A description of the data; counts of dialogues and labels if None.
        datasets: Hub ids of the data sets.
    """
    metadata = metadata.with_task(labels.names, prompt)
    if labels.aliases:
        metadata = dataclasses.replace(metadata, task={**(metadata.task or {}), "aliases": dict(labels.aliases)})
    counts = report["train"]
    judged = ", ".join(f"{count} {name}" for name, count in counts["labels"].items())
    words = training_data or f"{counts['dialogues']} dialogues of {counts['utterances']} utterances: {judged}."
    return dataclasses.replace(metadata, training_data=words, datasets=list(datasets) or None)
