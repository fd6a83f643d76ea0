"""The common style of all pictures: a hue is an emotion; light grey is without memory, dark grey is with memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from mal_adapter.ser.evaluation.arms import ARMS
from mal_adapter.ser.evaluation.colors import emotion_colors, ink_on

__all__ = ["GREYS", "LETTERS_FIT", "WITH", "WITHOUT", "draw_answers", "in_percent", "legend_above", "percent"]

WITHOUT, WITH = "#98a2ad", "#2b3a4a"
GREYS = {ARMS["host_only"].title: WITHOUT, ARMS["own"].title: WITH}
_UNKNOWN = "#f2f2f2"
#: The number of letters that fit side by side along the x axis of a picture 9.6 inches wide.
LETTERS_FIT = 90


def percent(share: float, digits: int = 0) -> str:
    """A share as text, such as "64 %"."""
    return f"{100 * share:.{digits}f} %"


def in_percent() -> PercentFormatter:
    """A formatter for the ticks of an axis of shares, in the style of `percent`."""
    return PercentFormatter(1, symbol=" %")


def legend_above(axes: Axes, handles: Sequence[Patch] = (), ncols: int = 12) -> None:
    """Draw a legend above the axes, where it covers no data: of `handles`, or of everything drawn that has a label."""
    axes.legend(
        handles=handles or axes.get_legend_handles_labels()[0],
        loc="lower right",
        bbox_to_anchor=(1, 1),
        frameon=False,
        ncols=ncols,
    )


def draw_answers(
    axes: Axes, truths: Sequence[str | None], systems: Mapping[str, Sequence[Mapping[str, float]]]
) -> None:
    """Draw a dialogue as coloured cells: a row for the truth and one per system, a column per turn at 0, 1, ….

    A cross marks a wrong answer. If a dialogue is too long for words in its cells, a legend names the colours.

    What is mutated: `axes`.

    Args:
        axes: Its y axis names the rows.
        truths: The true emotion of each turn; None where it is unknown.
        systems: Name -> one dict per turn, label -> probability.
    """
    colors = emotion_colors(next(iter(systems.values()))[0])
    wordy = len(truths) * max(map(len, [*colors, "✗ 100 %"])) <= LETTERS_FIT
    for turn, truth in enumerate(truths):
        cells: list[tuple[str | None, str]] = [(truth, (truth or "–") if wordy else "")]
        for answers in systems.values():
            label, probability = max(answers[turn].items(), key=lambda pair: pair[1])
            cross = "✗ " if truth not in (None, label) else ""
            cells.append((label, f"{label}\n{cross}{percent(probability)}" if wordy else cross.strip()))
        for row, (shown, words) in enumerate(cells):
            color = colors.get(shown or "", _UNKNOWN)
            axes.barh(row, 0.95, left=turn - 0.475, height=0.88, color=color)
            axes.text(turn, row, words, ha="center", va="center", fontsize=9, color=ink_on(color))
    if not wordy:
        legend_above(axes, [Patch(color=color, label=label) for label, color in colors.items()])
    axes.set_yticks(range(1 + len(systems)), ["truth", *systems])
    axes.set(xlim=(-0.5, len(truths) - 0.5), ylim=(len(systems) + 0.5, -0.5))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
