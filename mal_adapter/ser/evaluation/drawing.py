"""What all pictures have in common: a hue means an emotion; without and with memory are a light and a dark grey."""

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
#: So many letters have room side by side along the x axis of a picture 9.6 inches wide.
LETTERS_FIT = 90


def percent(share: float, digits: int = 0) -> str:
    """A share in words, as in "64 %"."""
    return f"{100 * share:.{digits}f} %"


def in_percent() -> PercentFormatter:
    """Writes the ticks of an axis of shares as `percent` does."""
    return PercentFormatter(1, symbol=" %")


def legend_above(axes: Axes, handles: Sequence[Patch] = (), ncols: int = 12) -> None:
    """A legend above the axes, where no data can be, in rows of up to `ncols`; of what was drawn, or of `handles`."""
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
    """Draws a dialogue as coloured cells: a row for the truth and one for each system, a column per turn at 0, 1, ….

    An answer that is wrong is crossed. Where a dialogue is too long for words in its cells, a legend names the colours.

    Args:
        axes: drawn into; its y axis names the rows.
        truths: the true emotion of each turn, where known.
        systems: name -> for each turn, label -> probability.
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
