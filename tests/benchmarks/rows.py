"""A measured ratio beside its target."""

from typing import Any, NamedTuple

from tests.benchmarks.timing import Spread

__all__ = ["Row"]


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        measure: What is compared.
        size: At which size.
        figure: The ratio, or the number.
        sense: "≥" or "≤": on which side of the target it should be.
        target: None where there is none.
        times: Quartiles in ms, ours first.
        note: Anything else.
    """

    measure: str
    size: str
    figure: float
    sense: str = "≤"
    target: float | None = None
    times: tuple[Spread, ...] = ()
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without a target."""
        if self.target is None:
            return None
        return self.figure >= self.target if self.sense == "≥" else self.figure <= self.target

    def line(self) -> str:
        """As a row of a Markdown table."""
        times = " · ".join("{} ({}–{})".format(*map(_short, (t.median, t[0], t[2]))) for t in self.times) or self.note
        target = "" if self.target is None else f"{self.sense} {self.target:.3g}"
        verdict = {True: "met", False: "**missed**", None: ""}[self.met]
        return f"| {self.measure} | {self.size} | {self.figure:.3g} | {target} | {verdict} | {times} |"

    def as_json(self) -> dict[str, Any]:
        """Field by field, with the verdict."""
        return self._asdict() | {"met": self.met}


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:.0f}"
