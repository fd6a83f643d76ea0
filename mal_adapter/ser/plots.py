"""The plots of a report, each as an SVG text to put into a page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["plots_of"]

BARE, RIGHT = "#8a8a8a", "#0b6e99"
#: Turns that fewer dialogues reach say little; they are not drawn.
_FEWEST = 5
_LONGEST = 40


def plots_of(figures: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """(title, SVG, words below it) of what the arms allow.

    Args:
        figures: from `figures_of`.
        answers: of the evaluation they come from.
    """
    arms = figures["arms"]
    both = [arm for arm in ("bare", "right") if arm in arms]
    plots = []
    if len(both) == 2:
        plots.append(_gain_by_turn(figures))
    plots += [_systems(figures), _confusion(figures, both or list(arms)[:1]), _reliability(figures, both or list(arms))]
    if len(both) == 2 and (dialogue := _typical(answers)):
        plots.append(_timeline(dialogue))
    return plots


def _gain_by_turn(figures: Mapping[str, Any]) -> tuple[str, str, str]:
    rows = [row for row in figures["gain_by_turn"] if row["utterances"] >= _FEWEST][:_LONGEST]
    rows = rows or figures["gain_by_turn"][:_LONGEST]
    turns = [row["turn"] for row in rows]
    figure, (above, below) = _figure(2, height=5.0, sharex=True)
    for arm, color, name in (("bare", BARE, "without memory"), ("right", RIGHT, "with memory")):
        by_turn = {row["turn"]: row["wa"] for row in figures["arms"][arm]["by_turn"]}
        above.plot(turns, [by_turn[turn] for turn in turns], marker="o", markersize=4, color=color, label=name)
    above.set(ylabel="accuracy", ylim=(0, 1.02))
    above.legend(loc="lower right", frameon=False)
    gain = np.array([row["gain"] for row in rows])
    half = np.array([row["half_width"] or 0.0 for row in rows])
    below.axhline(0, color="#bbbbbb", linewidth=1)
    below.fill_between(turns, gain - half, gain + half, color=RIGHT, alpha=0.2, linewidth=0)
    below.plot(turns, gain, marker="o", markersize=4, color=RIGHT)
    below.set(xlabel="turn of the dialogue", ylabel="gain in accuracy")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    words = f"The band is a 95 % interval. Turns that fewer than {_FEWEST} dialogues reach are not drawn."
    return "Gain by turn", _svg(figure), words


def _systems(figures: Mapping[str, Any]) -> tuple[str, str, str]:
    systems = {**figures["arms"], **figures["against"]}
    names = list(systems)[::-1]
    figure, (axes,) = _figure(1, height=0.8 + 0.36 * len(names))
    values = np.array([systems[name]["wa"] for name in names])
    bounds = np.array([systems[name]["intervals"]["wa"] for name in names]).T
    colors = [RIGHT if name == "right" else "#c98a2b" if name in figures["against"] else BARE for name in names]
    errors = np.clip(np.stack([values - bounds[0], bounds[1] - values]), 0, None)
    axes.barh(names, values, color=colors, height=0.62, xerr=errors, ecolor="#333333", capsize=2)
    for place, value in enumerate(values):
        axes.text(0.01, place, f"{value:.3f}", va="center", color="white", fontsize=9)
    axes.set(xlabel="accuracy", xlim=(0, 1))
    return "The right memory, wrong ones, and others", _svg(figure), "Bars: 95 % bootstrap intervals over dialogues."


def _confusion(figures: Mapping[str, Any], arms: Sequence[str]) -> tuple[str, str, str]:
    labels = figures["run"]["labels"]
    size = max(2.6, 0.55 * len(labels) + 1.2)
    figure, axes = _figure(len(arms), height=size, side_by_side=True)
    for place, arm in zip(axes, arms, strict=True):
        counts = np.array(figures["arms"][arm]["confusion"], dtype=float)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        place.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), share in np.ndenumerate(shares):
            shade = "white" if share > 0.55 else "#222222"
            place.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=8, color=shade)
        place.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
        place.set_yticks(range(len(labels)), labels)
        place.set(title={"bare": "without memory", "right": "with memory"}.get(arm, arm), xlabel="answer")
        place.spines[:].set_visible(False)
    axes[0].set_ylabel("truth")
    return "Confusion", _svg(figure), "Shares of each true emotion; a row sums to 1."


def _reliability(figures: Mapping[str, Any], arms: Sequence[str]) -> tuple[str, str, str]:
    figure, (axes,) = _figure(1, height=3.6, width=4.4)
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1)
    for arm in arms:
        reliability = figures["arms"][arm]["reliability"]
        bins = reliability["bins"]
        name = {"bare": "without memory", "right": "with memory"}.get(arm, arm)
        axes.plot(
            [b["confidence"] for b in bins], [b["accuracy"] for b in bins],
            marker="o", markersize=4, color=RIGHT if arm == "right" else BARE,
            label=f"{name}, error {reliability['expected_calibration_error']:.3f}",
        )  # fmt: skip
    axes.set(xlabel="probability of the answer", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(loc="lower right", frameon=False)
    return "Reliability", _svg(figure), "On the line, an answer of probability p is right with probability p."


def _timeline(dialogue: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    figure, (above, below) = _figure(2, height=5.0, sharex=True)
    places = np.arange(len(dialogue))
    for arm, color, name, shift in (("bare", BARE, "without memory", -0.2), ("right", RIGHT, "with memory", 0.2)):
        heights = [row["arms"][arm][row["truth"]] if row["truth"] else 0.0 for row in dialogue]
        above.bar(places + shift, heights, width=0.38, color=color, label=name)
    above.set(ylabel="probability of the truth", ylim=(0, 1))
    above.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, ncols=2)
    below.plot(places, [row["surprise"] for row in dialogue], color="#8c2f39", marker="o", markersize=4)
    below.set(ylabel="surprise", ylim=(0, None))
    rotation = 0 if len(dialogue) <= 14 else 60
    below.set_xticks(places, [f"{row['speaker']}\n{row['truth'] or '–'}" for row in dialogue], rotation=rotation)
    words = (
        f"Dialogue {dialogue[0]['dialogue_id']}, of typical gain: who speaks, and the true emotion. Surprise is "
        "the norm of S, the gradients that the memory carries on after an utterance."
    )
    return "A dialogue's timeline", _svg(figure), words


def _typical(answers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The dialogue whose gain in the truth's probability is closest to the mean, among the longer half."""
    dialogues: dict[str, list[Mapping[str, Any]]] = {}
    for row in answers:
        if "arms" in row:
            dialogues.setdefault(row["dialogue_id"], []).append(row)
    judged = {name: rows for name, rows in dialogues.items() if any(row["truth"] for row in rows)}
    if not judged:
        return []
    median = float(np.median([len(rows) for rows in judged.values()]))
    longer = {name: rows[:_LONGEST] for name, rows in judged.items() if len(rows) >= median}

    def gain(rows: Sequence[Mapping[str, Any]]) -> float:
        return float(np.mean([_of_truth(row, "right") - _of_truth(row, "bare") for row in rows if row["truth"]] or [0]))

    mean = float(np.mean([gain(rows) for rows in longer.values()]))
    return longer[min(longer, key=lambda name: abs(gain(longer[name]) - mean))]


def _of_truth(row: Mapping[str, Any], arm: str) -> float:
    return float(row["arms"][arm][row["truth"]])


def _figure(
    count: int, *, height: float, width: float = 8.0, sharex: bool = False, side_by_side: bool = False
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    shape = (1, count) if side_by_side else (count, 1)
    axes = list(np.atleast_1d(figure.subplots(*shape, sharex=sharex)).flat)
    for place in axes:
        place.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> str:
    """The <svg> element alone; its text stays text, in the page's font."""
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
