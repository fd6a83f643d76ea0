"""The demonstration: the tiny host recognises held-out dialogues, WAV files, without its memory and with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from mal_adapter import AttachedMemory, attach_memory
from mal_adapter.demo.dialogues import make_dialogues, write_wavs
from mal_adapter.demo.shipped import ADAPTER_FOLDER, EMOTIONS, HOST_FOLDER, PROMPT
from mal_adapter.extras import require
from mal_adapter.ser.dialogue import Dialogue
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.progress import progress_bar, working
from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer
from mal_adapter.ser.recognizer.results import Failure, Prediction

__all__ = ["DemoReport", "describe_report", "load_demo", "plot_report", "run_demo"]

RESAMPLES = 2000


@dataclass(frozen=True)
class DemoReport:
    """The predictions of a demonstration. A row of `without` and `with_memory` is a dialogue, a column is a turn.

    Attributes:
        seed: Seed of the dialogues.
        dialogues: The utterances, with their true emotions.
        without: Predictions of the host alone.
        with_memory: Predictions of the same host with its memory.
    """

    seed: int
    dialogues: tuple[Dialogue, ...]
    without: tuple[tuple[Prediction, ...], ...]
    with_memory: tuple[tuple[Prediction, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """Accuracies overall and by turn, with 95 % bootstrap intervals over dialogues, as plain JSON values."""
        without, with_memory = _correct(self.without), _correct(self.with_memory)
        return {
            "accuracy_without_memory": float(without.mean()),
            "accuracy_with_memory": float(with_memory.mean()),
            "by_turn_without_memory": without.mean(0).tolist(),
            "by_turn_with_memory": with_memory.mean(0).tolist(),
            "intervals": {
                "accuracy_without_memory": bootstrap_interval(without),
                "accuracy_with_memory": bootstrap_interval(with_memory),
                "gain": bootstrap_interval(with_memory - without),
            },
            "dialogues": len(self.dialogues),
            "seed": self.seed,
        }


def load_demo() -> tuple[Any, Any, AttachedMemory]:
    """Load the shipped host and attach its memory, as with any other checkpoint and adapter.

    Returns:
        (model, processor, memory)

    Example:
        >>> model, processor, memory = load_demo()
        >>> memory.layer_idx
        1
    """
    model, processor = load_host(str(HOST_FOLDER))
    return model, processor, attach_memory(model, adapter=ADAPTER_FOLDER)


def run_demo(dialogues: int, seed: int, folder: Path, *, progress: bool = True) -> DemoReport:
    """Write held-out dialogues as WAV files, and recognise them with the host alone and with its memory.

    Args:
        dialogues: Number of dialogues, at least 1. No dialogue was used in training.
        seed: A non-negative integer. Each seed gives another set of dialogues.
        folder: For the WAV files and their manifest. Created if it does not exist.
        progress: Whether to show progress bars if stderr is a terminal.

    Returns:
        All predictions.
    """
    made = make_dialogues("test", seed, dialogues)
    bar = progress_bar(made, desc="making speech", total=dialogues, unit="dialogue", shown=progress, leave=False)
    spoken = write_wavs(list(bar), folder)
    with working("loading the model", shown=progress):
        model, processor, memory = load_demo()
    recognizer = EmotionRecognizer(model, processor, memory, EMOTIONS, PROMPT)
    with memory:
        without = _predictions(recognizer.without_memory(), spoken, "without memory", progress)
        with_memory = _predictions(recognizer, spoken, "with memory", progress)
    return DemoReport(seed, tuple(spoken), without, with_memory)


def bootstrap_interval(by_dialogue: NDArray[np.float64], resamples: int = RESAMPLES) -> list[float]:
    """95 % interval of the mean of (dialogues, turns) values. Whole dialogues are drawn: turns are not independent."""
    rng = np.random.default_rng(0)
    means = by_dialogue.mean(1)
    drawn = means[rng.integers(len(means), size=(resamples, len(means)))].mean(1)
    return [float(bound) for bound in np.percentile(drawn, [2.5, 97.5])]


def describe_report(report: DemoReport) -> str:
    """Format the first dialogue turn by turn, then the accuracies over all dialogues, as text."""
    rows = [("turn", "speaker", "truth", "without memory", "with memory", *report.with_memory[0][0].probabilities)]
    for turn, (alone, remembered) in enumerate(zip(report.without[0], report.with_memory[0], strict=True), start=1):
        truth = alone.utterance.emotion or ""
        answers = (f"{p.label} {p.probabilities[p.label]:.2f} {'+-'[p.label != truth]}" for p in (alone, remembered))
        probabilities = (f"{value:.2f}" for value in remembered.probabilities.values())
        rows.append((str(turn), alone.utterance.speaker, truth, *answers, *probabilities))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        f"dialogue {report.dialogues[0].dialogue_id}  (+ correct, - wrong; last columns: probabilities with memory)"
    ]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    figures = report.to_dict()
    lines += ["", f"{figures['dialogues']} held-out dialogues, seed {figures['seed']}"]
    for key in ("without_memory", "with_memory"):
        low, high = figures["intervals"][f"accuracy_{key}"]
        by_turn = " ".join(f"{value:.2f}" for value in figures[f"by_turn_{key}"])
        name, accuracy = key.replace("_", " "), figures[f"accuracy_{key}"]
        lines.append(f"{name:15} {accuracy:.3f}  (95 % {low:.3f} to {high:.3f})  by turn {by_turn}")
    low, high = figures["intervals"]["gain"]
    gain = figures["accuracy_with_memory"] - figures["accuracy_without_memory"]
    lines.append(f"{'gain':15} {gain:+.3f} (95 % {low:+.3f} to {high:+.3f})")
    return "\n".join(lines)


def plot_report(report: DemoReport, path: Path) -> None:
    """Draw accuracy by turn, and the first dialogue's timeline, into an image file.

    Args:
        report: From `run_demo`.
        path: Its suffix chooses the format.

    Raises:
        MissingDependencyError: Matplotlib is not installed; the extra `plot` brings it.
    """
    require("a plot", "matplotlib", extra="plot")
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    from mal_adapter.ser.evaluation.drawing import GREYS, draw_answers, in_percent, percent

    figure = Figure(figsize=(9.6, 6), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    cells, by_turn = figure.subplots(2, 1, height_ratios=(1, 1.6))
    predictions = {"without memory": report.without, "with memory": report.with_memory}
    spoken = report.dialogues[0].utterances
    systems = {name: [prediction.probabilities for prediction in rows[0]] for name, rows in predictions.items()}
    draw_answers(cells, [utterance.emotion for utterance in spoken], systems)
    cells.set_xticks(range(len(spoken)), [f"speaker {utterance.speaker}" for utterance in spoken], fontsize=9)
    cells.xaxis.tick_top()
    cells.set_title("One dialogue: the true emotions and the answers", loc="left", pad=10)

    turns = np.arange(1, len(spoken) + 1)
    ends = []
    for (name, rows), line in zip(predictions.items(), ("--", "-"), strict=True):
        correct = _correct(rows)
        mean = correct.mean(0)
        # Each dialogue has one utterance per turn, so that the trials of a turn are independent.
        low, high = zip(*(_wilson_interval(int(hits), len(correct)) for hits in correct.sum(0)), strict=True)
        by_turn.fill_between(turns, low, high, color=GREYS[name], alpha=0.18, linewidth=0)
        by_turn.plot(turns, mean, line, marker="o", markersize=5, color=GREYS[name])
        ends.append((mean[-1], f"{name}\n{percent(correct.mean())} of all"))
    ends.sort(key=itemgetter(0))
    for (end, words), side in zip(ends, ("top", "bottom"), strict=True):  # so that the labels do not overlap
        by_turn.annotate(words, (turns[-1], end), xytext=(12, 0), textcoords="offset points", va=side)
    chance = 1 / len(EMOTIONS)
    by_turn.axhline(chance, color="#888888", linewidth=1, linestyle=":")
    by_turn.annotate("chance", (turns[0], chance), xytext=(0, 4), textcoords="offset points")
    by_turn.set(xlabel="turn of the dialogue", ylabel="accuracy", ylim=(0, 1.02), xticks=turns)
    by_turn.set_xlim(0.5, len(turns) + 0.5)  # each turn is below its cells
    by_turn.yaxis.set_major_formatter(in_percent())
    by_turn.spines[["top", "right"]].set_visible(False)
    count = len(report.dialogues)
    title = f"Accuracy by turn in {count} held-out dialogue{'s' if count > 1 else ''}, with 95 % intervals"
    by_turn.set_title(title, loc="left", pad=12)
    figure.savefig(path, dpi=110)


def _wilson_interval(hits: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share; unlike a normal interval, it has a width even if all or none are correct."""
    interval = binomtest(hits, trials).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def _correct(rows: tuple[tuple[Prediction, ...], ...]) -> NDArray[np.float64]:
    return np.array([[p.label == p.utterance.emotion for p in row] for row in rows], dtype=np.float64)


def _predictions(
    recognizer: EmotionRecognizer, dialogues: Sequence[Dialogue], name: str, progress: bool
) -> tuple[tuple[Prediction, ...], ...]:
    rows: dict[str, list[Prediction]] = {dialogue.dialogue_id: [] for dialogue in dialogues}
    total = sum(len(dialogue.utterances) for dialogue in dialogues)
    results = recognizer.recognize_many(dialogues, batch_size=16)
    for result in progress_bar(results, desc=name, total=total, unit="utterance", shown=progress, leave=False):
        if isinstance(result, Failure):
            raise result.error
        rows[result.utterance.dialogue_id].append(result)
    return tuple(tuple(row) for row in rows.values())
