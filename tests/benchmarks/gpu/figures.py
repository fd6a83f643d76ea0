"""A measured number beside its target and beside what version 0.1.0 had."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["HEADER", "Figure", "more_than", "share", "short"]

HEADER = "| measure | size | 0.1.0 | now | to reach | | |\n|---|---|---|---|---|---|---|"


@dataclasses.dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        measure: What is measured.
        size: At which size.
        value: The number; NaN where it could not be measured, and `note` says why.
        unit: "ms", "µs", "s", "%", "times" or "" for a number.
        before: What version 0.1.0 had on an H200.
        target: To reach; None where there is no target.
        sense: "≤" or "≥": on which side of the target the value should be.
        note: Anything else.
        numbers: What the value was computed from, for the JSON.
    """

    measure: str
    size: str
    value: float
    unit: str = "ms"
    before: str = ""
    target: float | None = None
    sense: str = "≤"
    note: str = ""
    numbers: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_time(self) -> bool:
        """Whether it depends on the machine and the size, and not on the code alone."""
        return bool(self.unit)

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without a target. What could not be measured is missed."""
        if self.target is None:
            return None
        return self.value >= self.target if self.sense == "≥" else self.value <= self.target

    @property
    def verdict(self) -> str:
        """met or MISSED, with both numbers."""
        if self.met is None:
            return ""
        relation = self.sense if self.met else {"≤": ">", "≥": "<"}[self.sense]
        if math.isnan(self.value):
            return "**MISSED**: not measured"
        return f"{'met' if self.met else '**MISSED**'}: {short(self.value)} {relation} {short(self.target or 0)}"

    def line(self) -> str:
        """As a row of a Markdown table."""
        unit = f" {self.unit}" if self.unit else ""
        now = "—" if math.isnan(self.value) else f"{short(self.value)}{unit}"
        target = "" if self.target is None else f"{self.sense} {short(self.target)}{unit}"
        note = self.note.replace("|", "/").replace("\n", " ")
        return f"| {self.measure} | {self.size} | {self.before} | {now} | {target} | {self.verdict} | {note} |"

    def as_json(self) -> dict[str, Any]:
        """Field by field, with the verdict; JSON has no NaN."""
        value = None if math.isnan(self.value) else self.value
        return {**dataclasses.asdict(self), "value": value, "met": self.met}


def short(number: float) -> str:
    """Three digits.

    Example:
        >>> short(0.01234), short(1234.5), short(3e-7), short(0)
        ('0.0123', '1234', '3e-07', '0')
    """
    return f"{number:.0f}" if 1000 <= abs(number) < 1e6 else f"{number:.3g}"


def more_than(times: Sequence[float], base: Sequence[float]) -> float:
    """By how many percent `times` are more than `base`, of the same rounds: the median of their differences over the
    median of `base`. A drift of the clock that both share cancels out.

    Example:
        >>> more_than([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
        10.0
    """
    return 100 * statistics.median(t - b for t, b in zip(times, base, strict=True)) / statistics.median(base)


def share(times: Sequence[float], base: Sequence[float]) -> float:
    """How many times `base` the `times` are, of the same rounds: the median of their ratios.

    Example:
        >>> share([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
        2.0
    """
    return statistics.median(t / b for t, b in zip(times, base, strict=True))
