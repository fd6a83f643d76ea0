"""`AdapterMetadata`: an adapter's host, task, training data and results."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from mal_adapter.errors import AdapterFormatError
from mal_adapter.serialization.text import shown

__all__ = ["AdapterMetadata"]


@dataclasses.dataclass(frozen=True)
class AdapterMetadata:
    """An adapter's host, task, training data and results: everything but its configuration and weights.

    Attributes:
        layer_idx: The decoder layer it was trained on.
        base_model_name_or_path: The host checkpoint's name.
        model_type: The host's `config.model_type`.
        hidden_size: The width of the host's decoder layers.
        num_hidden_layers: How many decoder layers the host has.
        task: `{"labels": [...], "prompt": "..."}` of the recogniser it was trained for, or None. If corpora use
            other names for its labels, also `"aliases": {"hap": "happy"}`.
        datasets: Hub ids of the datasets it was trained on.
        training_data: A description of its training data.
        evaluation: Results, each `{"dataset_name": "MELD", "dataset_type": "user/meld", "dataset_split": "test",
            "metrics": {"f1": 0.6}, "host_metrics": {"f1": 0.5}}`: `dataset_type` is a Hub id or a name without spaces,
            `metrics` are measured with the memory, `host_metrics` without it on the same data. `dataset_split` and
            `host_metrics` are optional.

    Example:
        >>> AdapterMetadata(layer_idx=16).with_task(["happy", "sad"], "How does the speaker feel?").task["labels"]
        ['happy', 'sad']
    """

    layer_idx: int | None = None
    base_model_name_or_path: str | None = None
    model_type: str | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    task: dict[str, Any] | None = None
    datasets: list[str] | None = None
    training_data: str | None = None
    evaluation: list[dict[str, Any]] | None = None

    def with_task(self, labels: Sequence[str], prompt: str) -> "AdapterMetadata":
        """The same metadata, for an adapter that answers `prompt` with one of `labels`."""
        return dataclasses.replace(self, task={"labels": list(labels), "prompt": prompt})

    def check(self) -> None:
        """Raise `AdapterFormatError` if a field has the wrong type or is out of range; None is always valid."""
        for name, expected in _EXPECTED.items():
            if (value := getattr(self, name)) is not None and not _CHECKS[expected](value):
                raise AdapterFormatError(f"{name} is {shown(value)}, expected {expected}")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_task(value: object) -> bool:
    return (
        isinstance(value, dict)
        and _is_texts(value.get("labels", []))
        and _is_text(value.get("prompt", ""))
        and isinstance(aliases := value.get("aliases", {}), dict)
        and all(map(_is_text, aliases.values()))
    )


def _is_metrics(value: object) -> bool:
    return isinstance(value, dict) and all(
        _is_text(name) and type(number) in (int, float) and abs(number) < 1e12 for name, number in value.items()
    )


def _is_evaluation(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(result, dict)
        and result.keys() <= {"dataset_name", "dataset_type", "dataset_split", "metrics", "host_metrics"}
        and all(_is_text(result.get(name)) for name in ("dataset_name", "dataset_type"))
        and _is_text(result.get("dataset_split", ""))
        and _is_metrics(result.get("metrics"))
        and _is_metrics(result.get("host_metrics", {}))
        for result in value
    )


_CHECKS = {
    "a string": _is_text,
    "a list of strings": _is_texts,
    "a count": _is_count,
    "labels, a list of strings, a prompt, a string, and aliases, other name -> label": _is_task,
    "a list of results with dataset_name, dataset_type and metrics": _is_evaluation,
}
_EXPECTED = {
    "layer_idx": "a count",
    "base_model_name_or_path": "a string",
    "model_type": "a string",
    "hidden_size": "a count",
    "num_hidden_layers": "a count",
    "task": "labels, a list of strings, a prompt, a string, and aliases, other name -> label",
    "datasets": "a list of strings",
    "training_data": "a string",
    "evaluation": "a list of results with dataset_name, dataset_type and metrics",
}
