"""The report of an evaluation: its figures as JSON, and one self-contained HTML file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from mal_adapter.errors import EvaluationError, MalAdapterError, MetricsError, raise_problems
from mal_adapter.extras import missing_dependency
from mal_adapter.ser.dialogue import Dialogue
from mal_adapter.ser.evaluation.arms import ARMS, WRONG_PASTS
from mal_adapter.ser.evaluation.evaluation import Evaluation
from mal_adapter.ser.evaluation.metrics import compare, difference_intervals, fold_intervals, score
from mal_adapter.ser.evaluation.scores import METRICS
from mal_adapter.ser.evaluation.verdict import verdict_of
from mal_adapter.ser.labels import LabelSet
from mal_adapter.serialization.atomic import folder_problem, write_atomically

__all__ = [
    "FEWEST_DIALOGUES",
    "FEWEST_SPEAKERS",
    "card_entry",
    "figures_of",
    "pooled",
    "report_problems",
    "rival_problems",
    "write_report",
]

JSON_NAME, HTML_NAME = "report.json", "report.html"
Rows = list[dict[str, Any]]

_BINS = 10  # of the reliability plot
_ABSENT = object()
FEWEST_DIALOGUES = 6
"""With fewer dialogues, no difference is significant at 5 %: with n dialogues, p is at least 2 / 2 ** n."""
FEWEST_SPEAKERS = 6
"""With fewer speakers, a bootstrap over them is too narrow."""
FEWEST_FOLDS = 3


def write_report(
    folder: str | os.PathLike[str], evaluations: Sequence[Evaluation], against: Sequence[Evaluation] = ()
) -> dict[str, Any]:
    """Write `report.json` and `report.html` into a folder.

    Args:
        folder: Created if it does not exist.
        evaluations: Of different dialogues, such as the folds of a cross-validation. They are reported as one.
        against: Other systems on the same utterances. The arm "own" of each is compared, or else its first arm.

    Returns:
        The content of `report.json`, see `figures_of`.

    Raises:
        EvaluationError: The evaluations do not fit together, or `folder` can't be written to.
        MissingDependencyError: scikit-learn, matplotlib or jinja2 is not installed.
        MetricsError: No labelled utterance has an answer.
    """
    raise_problems(report_problems(folder))
    from mal_adapter.ser.evaluation.plots import plots_of

    whole = pooled(evaluations)
    figures = figures_of(whole, against)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / JSON_NAME, (json.dumps(figures, indent=2) + "\n").encode())
    page = _page(figures, plots_of(figures, whole.answers))
    write_atomically(folder / HTML_NAME, page.encode(errors="backslashreplace"))  # a path need not be Unicode
    return figures


def report_problems(folder: str | os.PathLike[str]) -> list[MalAdapterError]:
    """Why a report can't be written into a folder, as far as it is known before the evaluation."""
    problems: list[MalAdapterError] = []
    if missing := missing_dependency("a report", "sklearn", "matplotlib", "jinja2", extra="train"):
        problems.append(missing)
    if problem := folder_problem(Path(folder)):
        problems.append(EvaluationError(problem))
    return problems


def rival_problems(
    dialogues: Sequence[Dialogue], labels: LabelSet, arms: Sequence[str], against: Sequence[Evaluation]
) -> list[MalAdapterError]:
    """Why other evaluations can't be compared with a future evaluation of these dialogues."""
    problems: list[MalAdapterError] = []
    judged = [u for d in dialogues for u in d.utterances if u.emotion is not None and u.emotion in labels]
    names = list(arms)
    for other in against:
        if other.name in names:
            problems.append(EvaluationError(f"two systems have the name {other.name!r}; rename their folders"))
        names.append(other.name)
        if unknown := [name for name in other.run["labels"] if name not in labels]:
            problems.append(
                EvaluationError(
                    f"{other.name} has the labels {', '.join(unknown)}, but here they are {_words(list(labels))}"
                )
            )
        truths = {(answer["dialogue_id"], answer["utterance_id"]): answer["truth"] for answer in other.answers}
        for u in judged:
            key, truth = (u.dialogue_id, u.utterance_id), labels.lookup(u.emotion or "")
            if truths.get(key) != truth:
                problems.append(_other_utterances(other, key, truth, truths.get(key) if key in truths else _ABSENT))
                break
    return problems


def _other_utterances(other: Evaluation, key: tuple[str, str], truth: str, theirs: object) -> EvaluationError:
    there = "not in it" if theirs is _ABSENT else f"{theirs} in it and {truth} here"
    return EvaluationError(f"{other.name} is of other utterances: {key[0]}/{key[1]} is {there}")


def pooled(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Join evaluations of different dialogues into one.

    Raises:
        EvaluationError: There is none; their labels, arms, hosts or prompts differ; or a dialogue is in two of them.
    """
    if not evaluations:
        raise EvaluationError("there is no evaluation to report")
    first, *others = evaluations
    for other in others:
        for part in ("labels", "arms", "host", "prompt"):
            if other.run[part] != first.run[part]:
                raise EvaluationError(
                    f"{first.name} and {other.name} differ in their {part}: {first.run[part]} and {other.run[part]}"
                )
    owners: dict[str, str] = {}
    for evaluation in evaluations:
        for name in {answer["dialogue_id"] for answer in evaluation.answers}:
            if name in owners:
                raise EvaluationError(f"the dialogue {name!r} is in {owners[name]} and in {evaluation.name}")
            owners[name] = evaluation.name
    run = dict(first.run)
    for part in ("fingerprint", "control"):
        found = [evaluation.run.get(part) for evaluation in evaluations]
        run[part] = found[0] if len(set(found)) == 1 else found
    name = ", ".join(evaluation.name for evaluation in evaluations)
    answers = [{**answer, "fold": number} for number, one in enumerate(evaluations) for answer in one.answers]
    return Evaluation(name, run, answers)


def figures_of(evaluation: Evaluation, against: Sequence[Evaluation] = ()) -> dict[str, Any]:
    """Compute all figures of a report, as plain JSON values.

    Returns:
        `run`; `arms` (arm -> `Scores.to_dict` and `reliability`); `against` (name -> the same); `compared` (a list of
        `first`, `second`, per metric difference and p, and `intervals` of the difference: over what -> metric -> low
        and high); `clusters` (over what -> how many); `audit` (wrong past -> share of the gain that is lost with it);
        `verdict`, in words; `gain_by_turn`, over `gain_over`; and `left_out` (utterance -> why it could not be
        processed).

    Raises:
        EvaluationError: Two systems have the same name, or `against` is of other utterances.
        MetricsError: No labelled utterance has an answer.
    """
    labels = evaluation.labels
    judged = [answer for answer in evaluation.answers if "arms" in answer and answer["truth"] is not None]
    if not judged and (left_out := next((a for a in evaluation.answers if "error" in a and a["truth"]), None)):
        raise MetricsError(f"no labelled utterance could be processed; the first error is: {left_out['error']}")
    arms = [arm for arm in ARMS if arm in evaluation.run["arms"]]
    main = "own" if "own" in arms else arms[0]
    probabilities = {arm: [answer["arms"][arm] for answer in judged] for arm in arms}
    for other in against:
        if other.name in probabilities:
            raise EvaluationError(f"two systems have the name {other.name!r}; rename their folders")
        probabilities[other.name] = _probabilities_of(other, judged)

    truth, ids = [answer["truth"] for answer in judged], [answer["dialogue_id"] for answer in judged]
    turns = [answer["turn"] for answer in judged]
    clusters = _clusters(judged)
    answers = {name: [_best(row) for row in rows] for name, rows in probabilities.items()}
    figures: dict[str, Any] = {"run": evaluation.run, "arms": {}, "against": {}, "compared": []}
    figures["clusters"] = {kind: len(set(numbers)) for kind, numbers in clusters.items()}
    for name, rows in probabilities.items():
        scores = score(truth, answers[name], ids, labels, turns=turns).to_dict()
        figures["arms" if name in arms else "against"][name] = scores | {"reliability": _reliability(rows, truth)}
        if name != main:
            tests = {m: compare(truth, answers[name], answers[main], ids, labels, metric=m).to_dict() for m in METRICS}
            intervals = {
                kind: (fold_intervals if kind == "folds" else difference_intervals)(
                    truth, answers[name], answers[main], numbers, labels
                )
                for kind, numbers in clusters.items()
            }
            as_json = {kind: {m: list(pair) for m, pair in bounds.items()} for kind, bounds in intervals.items()}
            figures["compared"].append({"first": name, "second": main, **tests, "intervals": as_json})
    figures["audit"] = _audit(figures["arms"])
    figures["verdict"] = verdict_of(figures)
    base = next((arm for arm in ("control", "host_only") if arm in arms), None)
    figures["gain_over"] = base if "own" in arms else None
    figures["gain_by_turn"] = [] if base is None or "own" not in arms else _gain_by_turn(judged, base)
    figures["left_out"] = {
        f"{answer['dialogue_id']}/{answer['utterance_id']}": answer["error"]
        for answer in evaluation.answers
        if "error" in answer
    }
    return figures


def card_entry(figures: Mapping[str, Any], name: str, split: str | None) -> dict[str, Any]:
    """The scores with and without memory, as an entry of `AdapterMetadata.evaluation`."""
    shown = {"wa": "accuracy", "ua": "unweighted_accuracy", "weighted_f1": "weighted_f1"}
    entry: dict[str, Any] = {"dataset_name": name, "dataset_type": name.lower().replace(" ", "-")}
    entry |= {} if split is None else {"dataset_split": split}
    for key, arm in (("metrics", "own"), ("host_metrics", "host_only")):
        if arm in figures["arms"]:
            entry[key] = {title: round(figures["arms"][arm][metric], 4) for metric, title in shown.items()}
    return entry


def _best(probabilities: Mapping[str, float]) -> str:
    return max(probabilities, key=probabilities.__getitem__)


def _probabilities_of(other: Evaluation, judged: Rows) -> list[dict[str, float]]:
    """The probabilities that another system gives for the same utterances."""
    arm = "own" if "own" in other.run["arms"] else other.run["arms"][0]
    found = {(a["dialogue_id"], a["utterance_id"]): a for a in other.answers if "arms" in a}
    rows = [found.get((answer["dialogue_id"], answer["utterance_id"])) for answer in judged]
    for answer, row in zip(judged, rows, strict=True):
        if row is None or row["truth"] != answer["truth"]:
            key = answer["dialogue_id"], answer["utterance_id"]
            raise _other_utterances(other, key, answer["truth"], _ABSENT if row is None else row["truth"])
    return [row["arms"][arm] for row in rows if row is not None]


def _reliability(probabilities: Sequence[Mapping[str, float]], truth: Sequence[str]) -> dict[str, Any]:
    """Count, mean confidence and accuracy of each bin of confidence, and the expected calibration error."""
    confidence = np.array([max(row.values()) for row in probabilities])
    correct = np.array([_best(row) == emotion for row, emotion in zip(probabilities, truth, strict=True)])
    places = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    bins = [
        {
            "count": int(here.sum()),
            "confidence": float(confidence[here].mean()),
            "accuracy": float(correct[here].mean()),
        }
        for here in (places == place for place in range(_BINS))
        if here.any()
    ]
    error = sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / len(confidence)
    return {"bins": bins, "expected_calibration_error": error}


def _audit(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Wrong past -> share of the gain in accuracy that is lost with it; None if there is no gain."""
    if not {"host_only", "own"} <= arms.keys():
        return {}
    gain = arms["own"]["wa"] - arms["host_only"]["wa"]
    lost = {arm: arms["own"]["wa"] - arms[arm]["wa"] for arm in WRONG_PASTS if arm in arms}
    return {arm: loss / gain if gain > 0 else None for arm, loss in lost.items()}


def _clusters(judged: Rows) -> dict[str, list[Any]]:
    """What intervals are over -> the cluster of each utterance.

    An utterance belongs to its own speaker, so the speakers of a dialogue are drawn independently of each other; that
    the utterances of a dialogue depend on each other is in the interval over dialogues. With few speakers, folds take
    their place.
    """
    clusters: dict[str, list[Any]] = {"dialogues": [answer["dialogue_id"] for answer in judged]}
    speakers, folds = [answer["speaker"] for answer in judged], [answer.get("fold", 0) for answer in judged]
    if len(set(speakers)) >= FEWEST_SPEAKERS:
        clusters["speakers"] = speakers
    elif len(set(folds)) >= FEWEST_FOLDS:
        clusters["folds"] = folds
    return clusters


def _gain_by_turn(judged: Rows, base: str) -> list[dict[str, Any]]:
    """Own minus `base` in accuracy at each turn, with a 95 % normal interval; a dialogue has one utterance per turn."""
    gains: dict[int, list[int]] = {}
    for answer in judged:
        own, without = (_best(answer["arms"][arm]) == answer["truth"] for arm in ("own", base))
        gains.setdefault(answer["turn"], []).append(int(own) - int(without))
    rows = []
    for turn, values in sorted(gains.items()):
        half = 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
        rows.append({"turn": turn, "utterances": len(values), "gain": float(np.mean(values)), "half_width": half})
    return rows


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(one)}" for name, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else "–" if value is None else str(value)


def _page(figures: Mapping[str, Any], plots: Sequence[tuple[str, str, str]]) -> str:
    from jinja2 import Environment
    from markupsafe import Markup

    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files("mal_adapter.ser.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    run = {name: _words(value) for name, value in figures["run"].items()}
    return template.render(
        figures=figures,
        run=run,
        described=ARMS,
        compared={entry["first"]: entry for entry in figures["compared"]},
        plots=[(title, Markup(image), words) for title, image, words in plots],
    )
