"""Scores of one system, and of two systems compared; as text and as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["METRICS", "ClassScores", "Comparison", "Scores", "TurnScores"]

METRICS = ("wa", "ua", "weighted_f1", "macro_f1")
"""The scores over all utterances, by the names of their fields in `Scores`."""


@dataclass(frozen=True)
class ClassScores:
    """Scores of one class. Undefined precision, recall and F1 are 0, as in scikit-learn."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class TurnScores:
    """Scores of all utterances at one position of their dialogues."""

    turn: int
    wa: float
    weighted_f1: float
    support: int


@dataclass(frozen=True)
class Scores:
    """Scores of one system.

    Args:
        labels: The classes, in the order of `per_class` and of the rows and columns of `confusion`.
        utterances: Number of scored utterances.
        dialogues: Number of dialogues that they belong to.
        wa: Weighted accuracy, which is the plain accuracy.
        ua: Unweighted accuracy: the mean recall over the classes that occur in the truth (scikit-learn's
            `balanced_accuracy_score`).
        weighted_f1: F1 of the classes, weighted by support.
        macro_f1: The mean F1 over the classes that occur in the truth or in the answers (scikit-learn's default).
        per_class: One entry per class, also for classes that do not occur.
        confusion: Rows are the truth, columns the answers.
        intervals: Metric -> (low, high), 95 % percentile bootstrap over dialogues. Empty without resamples.
        by_turn: One entry per position in the dialogue. Empty without turns.
    """

    labels: tuple[str, ...]
    utterances: int
    dialogues: int
    wa: float
    ua: float
    weighted_f1: float
    macro_f1: float
    per_class: tuple[ClassScores, ...]
    confusion: tuple[tuple[int, ...], ...]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    by_turn: tuple[TurnScores, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The scores as plain JSON values: dicts, lists, numbers and strings."""
        plain = asdict(self)
        plain["labels"] = list(self.labels)
        plain["per_class"], plain["by_turn"] = list(plain["per_class"]), list(plain["by_turn"])
        plain["confusion"] = [list(row) for row in self.confusion]
        plain["intervals"] = {name: list(interval) for name, interval in self.intervals.items()}
        return plain

    def __str__(self) -> str:
        lines = [f"{self.utterances} utterances of {self.dialogues} dialogues"]
        for name, title in zip(METRICS, ("WA", "UA", "weighted F1", "macro F1"), strict=True):
            interval = self.intervals.get(name)
            shown = f"   95 % [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
            lines.append(f"{title:<12}{getattr(self, name):>8.4f}{shown}")
        width = max(len("class"), *map(len, self.labels)) + 2
        lines += ["", f"{'class':<{width}}{'precision':>10}{'recall':>8}{'F1':>8}{'support':>9}"]
        for one in self.per_class:
            numbers = f"{one.precision:>10.4f}{one.recall:>8.4f}{one.f1:>8.4f}{one.support:>9}"
            lines.append(f"{one.label:<{width}}{numbers}")
        cell = max(width, 2 + len(str(self.utterances)))
        lines += ["", "truth \\ answer".ljust(16) + "".join(f"{label:>{cell}}" for label in self.labels)]
        for label, row in zip(self.labels, self.confusion, strict=True):
            lines.append(f"{label:<16}" + "".join(f"{count:>{cell}}" for count in row))
        if self.by_turn:
            lines += ["", f"{'turn':<6}{'WA':>8}{'WF1':>8}{'support':>9}"]
            lines += [f"{at.turn:<6}{at.wa:>8.4f}{at.weighted_f1:>8.4f}{at.support:>9}" for at in self.by_turn]
        return "\n".join(lines)


@dataclass(frozen=True)
class Comparison:
    """Two systems, compared on the same utterances.

    Args:
        metric: The name of the score.
        first, second: The score of each system.
        difference: second - first.
        p_value: Two-sided; the probability of a difference at least as large if the systems did not differ.
        dialogues: Number of dialogues whose answers could be exchanged.
    """

    metric: str
    first: float
    second: float
    difference: float
    p_value: float
    dialogues: int

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.metric}: {self.first:.4f} -> {self.second:.4f}, difference {self.difference:+.4f}, "
            f"p = {self.p_value:.4f} (approximate randomisation over {self.dialogues} dialogues)"
        )
