"""The common style of these pictures, in addition to `mal_adapter.ser.evaluation.drawing`: fonts, colours of speakers,
and files that are the same each time they are made."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mal_adapter.ser.evaluation.drawing import WITH, WITHOUT

INK = "#2b2b2b"
PALE = "#e9ecef"
GREY, MEMORY = WITHOUT, WITH
SPEAKERS = {"A": "#8a5a9e", "B": "#2f8f6b"}  # hues that no emotion has

matplotlib.rcParams.update(
    {
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.frameon": False,
        "svg.hashsalt": "mal_adapter",
        "mathtext.fontset": "dejavusans",
    }
)


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of `width` by `height` inches, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, figure.subplots(rows, columns, **options)


def note(axes: Axes, text: str, at: tuple[float, float], **options: Any) -> None:
    """Write a remark into the plot, in data coordinates."""
    axes.annotate(text, at, **{"fontsize": 8.5, "color": INK, **options})


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG or PNG, with the same bytes each time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The layout solver leaves the last digits to chance, and the ids in an SVG file depend on them.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        axes.set_position([round(edge, 6) for edge in axes.get_position().bounds])
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    figure.savefig(path, dpi=150, metadata=metadata)
