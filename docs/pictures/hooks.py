"""The places of the four hooks: one forward of a host in a session, from the tokens up."""

import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

TOKENS = ("text",) * 2 + ("audio",) * 6 + ("text",) * 2
LEFT, PITCH, SIZE = 3.0, 0.46, 0.36
WIDTH = PITCH * len(TOKENS) - PITCH + SIZE
MIDDLE = LEFT + WIDTH / 2


def draw() -> Figure:
    figure, axes = style.new_figure(9, 6.1)
    axes.set(xlim=(0, 12), ylim=(0.1, 8.3), aspect="equal")
    axes.axis("off")

    _box(axes, (LEFT - 0.35, 1.25), WIDTH + 0.7, 6.6, fc="none", ec=style.GREY, linestyle=(0, (4, 3)))
    axes.text(
        LEFT + WIDTH + 0.5,
        7.72,
        "the host: weights, token positions and\nsequence length stay as they are",
        va="top",
        fontsize=8.5,
        color="#6b6b6b",
        linespacing=1.4,
    )

    _tokens(axes, 0.65, style.SPEAKERS["A"])
    axes.text(MIDDLE, 0.3, "text · the utterance's audio tokens · question", ha="center", fontsize=8.5)
    _layer(axes, 1.55, "decoder layer 0")
    axes.text(MIDDLE, 2.46, "⋮", ha="center", va="center", fontsize=14)
    _layer(axes, 2.75, "decoder layer number layer_idx", hooked=True)
    _tokens(axes, 3.65, style.SPEAKERS["A"])
    _tokens(axes, 4.85, style.MEMORY)
    for number, kind in enumerate(TOKENS):
        x = LEFT + number * PITCH + SIZE / 2
        color, width = (style.MEMORY, 1.2) if kind == "audio" else (style.GREY, 0.7)
        _arrow(axes, (x, 3.65 + SIZE), (x, 4.85), color, width)
        if kind == "audio":
            circle = {"boxstyle": "circle,pad=0.08", "fc": "white", "ec": style.MEMORY, "lw": 0.9}
            axes.text(x, 4.38, "+", ha="center", va="center", fontsize=10, color=style.MEMORY, zorder=5, bbox=circle)
    _layer(axes, 5.65, "the next decoder layer")
    axes.text(MIDDLE, 6.56, "⋮", ha="center", va="center", fontsize=14)
    _layer(axes, 6.9, "head: the answer")

    _box(axes, (9.1, 3.7), 2.8, 2.0, fc="#eef1f4", ec=style.MEMORY)
    axes.text(10.5, 5.4, "memory of this dialogue", ha="center", va="center", weight="bold", color=style.MEMORY)
    axes.text(10.5, 4.57, "fast weights M\nmomentum S\noutside the host", ha="center", va="center", linespacing=1.6)
    end = LEFT + (TOKENS.index("audio") + 6) * PITCH
    _arrow(axes, (9.1, 4.38), (end, 4.38), style.MEMORY, 1.8)
    axes.text(9.0, 4.47, "1  read", ha="right", va="bottom", fontsize=8.5, color=style.MEMORY)
    _arrow(axes, (end, 5.03), (9.1, 5.03), style.MEMORY, 1.8)
    axes.text(9.0, 5.12, "2  write", ha="right", va="bottom", fontsize=8.5, color=style.MEMORY)

    _hook(axes, 7.85, "end", "after the model:\nkeeps the write if nothing failed", LEFT - 0.35)
    _hook(axes, 4.38, "layer", "after the hooked layer:\nreads, then prepares the write", LEFT)
    _hook(axes, 1.55, "begin", "before the model:\na forward starts", LEFT - 0.35, leads_to=1.25)
    _hook(axes, 0.6, "prompt", "before the model:\nfinds the audio tokens", LEFT, leads_to=0.83)
    return figure


def _tokens(axes: Axes, y: float, audio: str) -> None:
    for number, kind in enumerate(TOKENS):
        color = audio if kind == "audio" else "#cfd4d9"
        _box(axes, (LEFT + number * PITCH, y), SIZE, SIZE, fc=color, ec="none", rounding=0.06)


def _layer(axes: Axes, y: float, name: str, *, hooked: bool = False) -> None:
    edge = {"fc": "#f3f4f5", "ec": style.MEMORY if hooked else "#b8bec4", "linewidth": 2 if hooked else 1}
    _box(axes, (LEFT, y), WIDTH, 0.6, **edge)
    axes.text(MIDDLE, y + 0.3, name, ha="center", va="center")


def _hook(axes: Axes, y: float, name: str, what: str, end: float, leads_to: float | None = None) -> None:
    axes.text(0.05, y + 0.1, name, family="DejaVu Sans Mono", fontsize=9.5, weight="bold", va="bottom")
    axes.text(0.05, y + 0.02, what, fontsize=7.6, va="top", linespacing=1.35)
    axes.plot([0.95, end], [y + 0.2, y if leads_to is None else leads_to], color=style.INK, linewidth=0.7)


def _box(axes: Axes, at: tuple[float, float], width: float, height: float, rounding: float = 0.12, **style_of) -> None:
    shape = f"round,pad=0,rounding_size={rounding}"
    axes.add_patch(FancyBboxPatch(at, width, height, boxstyle=shape, **style_of))


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, width: float) -> None:
    shape = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=5 + 4 * width, color=color, linewidth=width, shrinkA=0, shrinkB=0
    )
    axes.add_patch(shape)
