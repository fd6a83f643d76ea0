"""The plots of a report, each as SVG text for an HTML page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from mal_adapter.ser.evaluation.arms import ARMS
from mal_adapter.ser.evaluation.colors import ink_on
from mal_adapter.ser.evaluation.drawing import (
    GREYS,
    LETTERS_FIT,
    WITH,
    WITHOUT,
    draw_answers,
    in_percent,
    legend_above,
    percent,
)

__all__ = ["plots_of"]

_AGAINST = "#66788a"
#: The two arms that most plots compare, and their titles.
_COMPARED = {arm: ARMS[arm].title for arm in ("host_only", "own")}
#: Text stays text, in the page's font. A dollar sign in a speaker's name does not start a formula.
_STYLE = {"svg.fonttype": "none", "font.family": "sans-serif", "text.parse_math": False}
_TURNED: dict[str, Any] = {"rotation": 50, "ha": "right", "rotation_mode": "anchor"}
#: A turn that fewer dialogues reach is not drawn, since its accuracy is mostly chance.
_FEWEST = 5
#: Later turns are not drawn.
_LONGEST = 40


def plots_of(figures: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Draw every plot for which the evaluation has the arms.

    Args:
        figures: From `mal_adapter.ser.evaluation.report.figures_of`.
        answers: The answers of the same evaluation.

    Returns:
        (title, SVG text, caption) of each plot.
    """
    arms = figures["arms"]
    both = [arm for arm in _COMPARED if arm in arms]
    shown = both or list(arms)[:1]
    with rc_context(_STYLE):
        plots = [_gain_by_turn(figures)] if len(both) == 2 else []
        plots += [_systems(figures), _confusion(figures, shown), _reliability(figures, shown)]
        if len(both) == 2 and (dialogue := _typical(answers)):
            plots.append(_timeline(dialogue))
    return plots


def _gain_by_turn(figures: Mapping[str, Any]) -> tuple[str, str, str]:
    rows = [row for row in figures["gain_by_turn"] if row["utterances"] >= _FEWEST][:_LONGEST]
    rows = rows or figures["gain_by_turn"][:_LONGEST]
    turns = [row["turn"] for row in rows]
    figure, (above, below) = _figure(2, height=5.0, sharex=True)
    base = figures["gain_over"]
    for arm in dict.fromkeys(("host_only", base, "own")):
        by_turn = {row["turn"]: row["wa"] for row in figures["arms"][arm]["by_turn"]}
        style: dict[str, Any] = {"color": _AGAINST, "linestyle": "--"}
        style = style if arm == "control" else {"color": GREYS[ARMS[arm].title]}
        values = [by_turn[turn] for turn in turns]
        above.plot(turns, values, marker="o", markersize=4, label=ARMS[arm].title, **style)
    above.set(ylabel="accuracy", ylim=(0, 1.02))
    above.yaxis.set_major_formatter(in_percent())
    legend_above(above)
    gain = np.array([row["gain"] for row in rows])
    half = np.array([row["half_width"] or 0.0 for row in rows])
    below.axhline(0, color="#bbbbbb", linewidth=1)
    below.fill_between(turns, gain - half, gain + half, color=WITH, alpha=0.2, linewidth=0)
    below.plot(turns, gain, marker="o", markersize=4, color=WITH)
    below.set_xlim(0.5, max(turns) + 0.5)
    below.set(xlabel="turn of the dialogue", ylabel="gain in accuracy, points")
    below.yaxis.set_major_formatter(lambda value, _: f"{100 * value:+.0f}" if value else "0")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    words = (
        f"The gain is over the {'control' if base == 'control' else 'host alone'}, with a 95 % interval. Turns that "
        f"fewer than {_FEWEST} dialogues reach are not drawn."
    )
    return "Gain by turn", _svg(figure), words


def _systems(figures: Mapping[str, Any]) -> tuple[str, str, str]:
    systems = {**figures["arms"], **figures["against"]}
    names = list(systems)[::-1]
    figure, (axes,) = _figure(1, height=0.8 + 0.36 * len(names))
    values = np.array([systems[name]["wa"] for name in names])
    bounds = np.array([systems[name]["intervals"]["wa"] for name in names]).T
    colors = [WITH if name == "own" else _AGAINST if name in figures["against"] else WITHOUT for name in names]
    errors = np.clip(np.stack([values - bounds[0], bounds[1] - values]), 0, None)
    titles = [f"{name} ({ARMS[name].title})" if name in figures["arms"] else name for name in names]
    seen_on_any = {"elinewidth": 1.2, "path_effects": [withStroke(linewidth=3.4, foreground="white")]}
    axes.barh(titles, values, color=colors, height=0.62, xerr=errors, error_kw=seen_on_any)
    for place, value in enumerate(values):
        weight = "bold" if names[place] == "own" else "normal"
        axes.text(1.02, place, percent(value, 1), va="center", ha="left", fontweight=weight)
    axes.set(xlabel="accuracy", xlim=(0, 1))
    axes.xaxis.set_major_formatter(in_percent())
    axes.tick_params(axis="y", length=0)
    words = "Thin lines are 95 % bootstrap intervals over dialogues."
    return "Accuracy by arm", _svg(figure), words


def _confusion(figures: Mapping[str, Any], arms: Sequence[str]) -> tuple[str, str, str]:
    labels = figures["run"]["labels"]
    edges = np.arange(len(labels) + 1) - 0.5
    figure, axes = _figure(
        len(arms), width=4.6 * len(arms), height=min(5.6, 0.55 * len(labels) + 1.2), side_by_side=True, sharey=True
    )
    for place, arm in zip(axes, arms, strict=True):
        counts = np.array(figures["arms"][arm]["confusion"], dtype=float)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        greys = Normalize(0, 1.3)  # without the black end of the colour map
        place.pcolormesh(edges, edges, shares, cmap="Greys", norm=greys, edgecolors="white", linewidth=2)
        for (row, column), share in np.ndenumerate(shares):
            ink = ink_on(to_hex(colormaps["Greys"](greys(share))))
            place.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=9, color=ink)
        place.set_xticks(range(len(labels)), labels, **(_TURNED if len(labels) > 4 else {}))
        place.set_yticks(range(len(labels)), labels)
        place.set(title=ARMS[arm].title, xlabel="answer", aspect="equal", ylim=(len(labels) - 0.5, -0.5))
        place.spines[:].set_visible(False)
        place.tick_params(length=0)
    axes[0].set_ylabel("truth")
    return "Confusion", _svg(figure), "Each cell is a percentage of its true emotion; a row sums to 100."


def _reliability(figures: Mapping[str, Any], arms: Sequence[str]) -> tuple[str, str, str]:
    figure, (axes,) = _figure(1, height=3.9, width=3.7)
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1)
    for arm in arms:
        reliability = figures["arms"][arm]["reliability"]
        bins = reliability["bins"]
        confidence, accuracy, counts = ([one[key] for one in bins] for key in ("confidence", "accuracy", "count"))
        color = WITH if arm == "own" else WITHOUT
        label = f"{ARMS[arm].title}, error {percent(reliability['expected_calibration_error'], 1)}"
        axes.plot(confidence, accuracy, color=color, linewidth=1, alpha=0.6)
        sizes = 8 + 240 * np.array(counts) / sum(counts)
        axes.scatter(confidence, accuracy, s=sizes, color=color, label=label, clip_on=False, zorder=3)
    axes.set(xlabel="probability of the answer", ylabel="share of correct answers", xlim=(0, 1), ylim=(0, 1))
    axes.xaxis.set_major_formatter(in_percent())
    axes.yaxis.set_major_formatter(in_percent())
    legend_above(axes, ncols=1)
    words = (
        "On the line, the share of correct answers equals their probability. The area of a dot is proportional to its "
        "number of answers. The error is the expected calibration error."
    )
    return "Reliability", _svg(figure), words


def _timeline(dialogue: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    figure, (cells, above, below) = _figure(3, height=6.6, sharex=True, ratios=(1.0, 1.2, 0.9))
    places = np.arange(len(dialogue))
    systems = {name: [row["arms"][arm] for row in dialogue] for arm, name in _COMPARED.items()}
    draw_answers(cells, [row["truth"] for row in dialogue], systems)
    for (name, answers), shift in zip(systems.items(), (-0.2, 0.2), strict=True):
        heights = [p[row["truth"]] if row["truth"] else 0.0 for row, p in zip(dialogue, answers, strict=True)]
        above.bar(places + shift, heights, width=0.38, color=GREYS[name], label=name)
    above.set(ylabel="probability\nof the truth", ylim=(0, 1))
    above.yaxis.set_major_formatter(in_percent())
    legend_above(above)
    below.plot(places, [row["surprise"] for row in dialogue], color=WITH, marker="o", markersize=4)
    figure.align_ylabels([above, below])
    below.set(xlabel="speaker", ylabel="surprise", ylim=(0, None))
    names = [row["speaker"] for row in dialogue]
    speakers = [name if len(name) <= 16 else f"{name[:15]}…" for name in names]
    crowded = len(dialogue) * max(map(len, speakers)) > LETTERS_FIT
    below.set_xticks(places, speakers, **(_TURNED if crowded else {}))
    words = (
        f"Dialogue {dialogue[0]['dialogue_id']}, whose gain is close to the mean. Above: the answers, and the "
        "probability of the true emotion. Below: the surprise, which is the norm of the memory's momentum S after each "
        "utterance."
    )
    return "A dialogue's timeline", _svg(figure), words


def _typical(answers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The dialogue, among the longer half, whose gain in the probability of the truth is closest to the mean."""
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
        return float(
            np.mean([_of_truth(row, "own") - _of_truth(row, "host_only") for row in rows if row["truth"]] or [0])
        )

    mean = float(np.mean([gain(rows) for rows in longer.values()]))
    return longer[min(longer, key=lambda name: abs(gain(longer[name]) - mean))]


def _of_truth(row: Mapping[str, Any], arm: str) -> float:
    return float(row["arms"][arm][row["truth"]])


def _figure(
    count: int,
    *,
    height: float,
    width: float = 9.6,
    sharex: bool = False,
    sharey: bool = False,
    side_by_side: bool = False,
    ratios: Sequence[float] | None = None,
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    shape = (1, count) if side_by_side else (count, 1)
    axes = list(np.atleast_1d(figure.subplots(*shape, sharex=sharex, sharey=sharey, height_ratios=ratios)).flat)
    for place in axes:
        place.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> str:
    """The <svg> element alone."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
