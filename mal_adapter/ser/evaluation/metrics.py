"""The usual scores of emotion recognition, with intervals and tests that resample whole dialogues.

Utterances of one dialogue depend on each other, and a memory makes them depend more. Intervals over single utterances
would be too narrow.
"""

from collections.abc import Hashable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mal_adapter.errors import MetricsError
from mal_adapter.extras import explain_missing
from mal_adapter.ser.evaluation.scores import METRICS, ClassScores, Comparison, Scores, TurnScores
from mal_adapter.ser.labels import LabelSet

__all__ = ["compare", "difference_intervals", "fold_intervals", "score"]

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]

#: Resamples per step, so that the weights of 10 000 dialogues take megabytes instead of gigabytes.
CHUNK = 100
#: Sums in another order differ by up to this much; differences that are equal apart from it count as equal.
ROUNDING = 1e-12


def score(
    truth: Sequence[str | None],
    answers: Sequence[str],
    dialogue_ids: Sequence[Hashable],
    labels: LabelSet,
    *,
    turns: Sequence[int] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Scores:
    """Score answers against the truth.

    Intervals are percentiles of a bootstrap over dialogues. A class that does not occur in a resample is left out, as
    in the score itself. With classes of a handful of utterances, the intervals of UA and macro F1 are biased upwards.

    Args:
        truth: The emotion of each utterance, as a name or alias. Utterances with None are left out.
        answers: The recognised emotions, as many as in `truth`.
        dialogue_ids: The dialogue of each utterance.
        labels: The classes.
        turns: The position of each utterance in its dialogue, for `by_turn`.
        resamples: Number of bootstrap draws; 0 leaves out the intervals.
        seed: Of the draws.

    Returns:
        The scores of all utterances, of each class and of each turn.

    Raises:
        MetricsError: Lengths differ, no utterance has a label, or `resamples` is negative.
        LabelError: An emotion or answer is not in the label set.
        MissingDependencyError: scikit-learn is not installed.

    Example:
        >>> labels = LabelSet(("neutral", "happy", "sad"))
        >>> result = score(["sad", "sad", None, "happy"], ["sad", "happy", "sad", "happy"], "aabb", labels)
        >>> result.utterances, round(result.wa, 4), result.ua, result.confusion[2]
        (3, 0.6667, 0.75, (0, 1, 1))
    """
    metrics = _sklearn_metrics()
    if resamples < 0:
        raise MetricsError(f"resamples must be at least 0, got {resamples}")
    if turns is not None and len(turns) != len(truth):
        raise MetricsError(f"turns must be as long as the truth, got {len(turns)} turns and {len(truth)} emotions")
    y_true, (y_pred,), dialogues, kept = _checked(truth, [answers], dialogue_ids, labels)
    classes = list(range(len(labels)))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        y_true, y_pred, labels=classes, zero_division=0
    )
    intervals = {}
    if resamples:
        tables = _tables(y_true, y_pred, dialogues, len(labels))
        draws = _bootstrap(tables, resamples, np.random.default_rng(seed))
        bounds = {name: np.percentile(draws[name], (2.5, 97.5)) for name in METRICS}
        intervals = {name: (float(low), float(high)) for name, (low, high) in bounds.items()}
    return Scores(
        labels=tuple(labels),
        utterances=len(y_true),
        dialogues=int(dialogues.max()) + 1,
        wa=float(metrics.accuracy_score(y_true, y_pred)),
        # balanced_accuracy_score without its warning about classes that are answered but do not occur
        ua=float(recall[support > 0].mean()),
        weighted_f1=float(metrics.f1_score(y_true, y_pred, average="weighted", zero_division=0)),
        macro_f1=float(metrics.f1_score(y_true, y_pred, average="macro", zero_division=0)),
        per_class=tuple(
            ClassScores(name, float(precision[n]), float(recall[n]), float(f1[n]), int(support[n]))
            for n, name in enumerate(labels)
        ),
        confusion=tuple(
            tuple(int(count) for count in row) for row in metrics.confusion_matrix(y_true, y_pred, labels=classes)
        ),
        intervals=intervals,
        by_turn=_by_turn(metrics, y_true, y_pred, turns, kept),
    )


def compare(
    truth: Sequence[str | None],
    first: Sequence[str],
    second: Sequence[str],
    dialogue_ids: Sequence[Hashable],
    labels: LabelSet,
    *,
    metric: str = "weighted_f1",
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Test whether two systems differ on the same utterances, by approximate randomisation over dialogues.

    If the systems did not differ, either of them could have given the answers to a dialogue. So the test exchanges the
    answers of the systems at random, dialogue by dialogue. p is the share of exchanges, the observed one included,
    with a difference at least as large (Noreen, 1989; Yeh, COLING 2000).

    Args:
        truth: The emotion of each utterance. Utterances with None are left out.
        first, second: The answers of the systems, as many as in `truth`.
        dialogue_ids: The dialogue of each utterance.
        labels: The classes.
        metric: One of `METRICS`.
        resamples: Number of random exchanges; the smallest p is 1 / (resamples + 1).
        seed: Of the exchanges.

    Returns:
        Both scores, their difference and p.

    Raises:
        MetricsError: Lengths differ, no utterance has a label, the metric is unknown, or `resamples` is below 1.
        LabelError: An emotion or answer is not in the label set.

    Example:
        >>> labels = LabelSet(("neutral", "happy"))
        >>> truth, dialogues = ["neutral", "happy"] * 8, [n // 2 for n in range(16)]
        >>> print(compare(truth, ["neutral"] * 16, truth, dialogues, labels, metric="wa"))
        wa: 0.5000 -> 1.0000, difference +0.5000, p = 0.00... (approximate randomisation over 8 dialogues)
    """
    if metric not in METRICS:
        raise MetricsError(f"unknown metric {metric!r}; expected one of {', '.join(METRICS)}")
    if resamples < 1:
        raise MetricsError(f"resamples must be at least 1, got {resamples}")
    y_true, (y_first, y_second), dialogues, _ = _checked(truth, [first, second], dialogue_ids, labels)
    tables = [_tables(y_true, answers, dialogues, len(labels)) for answers in (y_first, y_second)]
    totals = [table.sum(axis=0, keepdims=True) for table in tables]
    scores = [float(_from_tables(total, len(labels))[metric][0]) for total in totals]
    exchange = tables[1] - tables[0]
    rng = np.random.default_rng(seed)
    larger = 0
    for start in range(0, resamples, CHUNK):
        size = (min(CHUNK, resamples - start), len(exchange))
        moved = rng.integers(0, 2, size).astype(np.float64) @ exchange
        differences = (
            _from_tables(totals[1] - moved, len(labels))[metric] - _from_tables(totals[0] + moved, len(labels))[metric]
        )
        larger += int((np.abs(differences) >= abs(scores[1] - scores[0]) - ROUNDING).sum())
    p_value = (larger + 1) / (resamples + 1)
    return Comparison(metric, scores[0], scores[1], scores[1] - scores[0], p_value, len(exchange))


def difference_intervals(
    truth: Sequence[str | None],
    first: Sequence[str],
    second: Sequence[str],
    clusters: Sequence[Hashable],
    labels: LabelSet,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Paired intervals of the difference of two systems, by a bootstrap over clusters of utterances.

    Both systems are scored on the same resamples, so what makes a cluster easy for both does not widen the interval.

    Args:
        truth: The emotion of each utterance. Utterances with None are left out.
        first, second: The answers of the systems, as many as in `truth`.
        clusters: The cluster of each utterance: its dialogue, or its speaker. Whole clusters are drawn.
        labels: The classes.
        resamples: Number of draws.
        seed: Of the draws.

    Returns:
        Metric -> (low, high) of second - first: 95 % percentiles.

    Raises:
        MetricsError: Lengths differ, or no utterance has a label.
        LabelError: An emotion or answer is not in the label set.

    Example:
        >>> labels = LabelSet(("neutral", "happy"))
        >>> truth, dialogues = ["neutral", "happy"] * 8, [n // 2 for n in range(16)]
        >>> difference_intervals(truth, ["neutral"] * 16, truth, dialogues, labels)["wa"]
        (0.5, 0.5)
    """
    y_true, systems, numbers, _ = _checked(truth, [first, second], clusters, labels)
    before, after = (
        _bootstrap(_tables(y_true, answers, numbers, len(labels)), resamples, np.random.default_rng(seed))
        for answers in systems
    )
    bounds = {name: np.percentile(after[name] - before[name], (2.5, 97.5)) for name in METRICS}
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}


def fold_intervals(
    truth: Sequence[str | None],
    first: Sequence[str],
    second: Sequence[str],
    folds: Sequence[Hashable],
    labels: LabelSet,
) -> dict[str, tuple[float, float]]:
    """Intervals of the mean difference over folds, by Student's t: folds are too few for a bootstrap.

    Args:
        truth, first, second, labels: As for `difference_intervals`.
        folds: The fold of each utterance, at least two different ones.

    Returns:
        Metric -> (low, high) of second - first, 95 %.

    Raises:
        MetricsError: Lengths differ, no utterance has a label, or there is one fold only.
        LabelError: An emotion or answer is not in the label set.

    Example:
        >>> labels, folds = LabelSet(("neutral", "happy")), [n // 4 for n in range(8)]
        >>> truth = ["neutral", "happy"] * 4
        >>> fold_intervals(truth, ["neutral"] * 8, truth, folds, labels)["wa"]
        (0.5, 0.5)
    """
    from scipy.stats import t

    y_true, systems, numbers, _ = _checked(truth, [first, second], folds, labels)
    count = int(numbers.max()) + 1
    if count < 2:
        raise MetricsError("an interval over folds needs at least two of them; give several evaluations")
    before, after = (_from_tables(_tables(y_true, answers, numbers, len(labels)), len(labels)) for answers in systems)
    intervals = {}
    for name in METRICS:
        differences = after[name] - before[name]
        half = float(t.ppf(0.975, count - 1)) * float(differences.std(ddof=1)) / count**0.5
        intervals[name] = (float(differences.mean()) - half, float(differences.mean()) + half)
    return intervals


def _sklearn_metrics() -> Any:
    with explain_missing("a score", extra="train"):
        import sklearn.metrics
    return sklearn.metrics


def _checked(
    truth: Sequence[str | None],
    systems: Sequence[Sequence[str]],
    dialogue_ids: Sequence[Hashable],
    labels: LabelSet,
) -> tuple[Ints, list[Ints], Ints, list[int]]:
    """Class numbers of the truth and of each system, dialogues as 0, 1, …, and the indices of labelled utterances."""
    lengths = [len(truth), *map(len, systems), len(dialogue_ids)]
    if len(set(lengths)) > 1:
        raise MetricsError(
            f"truth, answers and dialogue ids must have the same length, got {lengths[0]} emotions, "
            f"{' and '.join(map(str, lengths[1:-1]))} answers and {lengths[-1]} dialogue ids"
        )
    kept = [place for place, emotion in enumerate(truth) if emotion is not None]
    if not kept:
        raise MetricsError(f"none of the {len(truth)} utterances has a true emotion; there is nothing to score")
    numbers: dict[Hashable, int] = {}
    dialogues = [numbers.setdefault(dialogue_ids[place], len(numbers)) for place in kept]
    y_true = np.array([labels.index(truth[place] or "") for place in kept], dtype=np.int64)
    y_systems = [np.array([labels.index(answers[place]) for place in kept], dtype=np.int64) for answers in systems]
    return y_true, y_systems, np.array(dialogues, dtype=np.int64), kept


def _by_turn(
    metrics: Any, y_true: Ints, y_pred: Ints, turns: Sequence[int] | None, kept: list[int]
) -> tuple[TurnScores, ...]:
    if turns is None:
        return ()
    positions = np.array([turns[place] for place in kept])
    scores = []
    for turn in np.unique(positions):
        true, pred = y_true[positions == turn], y_pred[positions == turn]
        weighted_f1 = float(metrics.f1_score(true, pred, average="weighted", zero_division=0))
        scores.append(TurnScores(int(turn), float(metrics.accuracy_score(true, pred)), weighted_f1, len(true)))
    return tuple(scores)


def _tables(y_true: Ints, y_pred: Ints, dialogues: Ints, classes: int) -> Floats:
    """The confusion matrix of each dialogue: (dialogues, classes * classes). All scores follow from their sum."""
    cells = classes * classes
    flat = (dialogues * classes + y_true) * classes + y_pred
    return np.bincount(flat, minlength=(int(dialogues.max()) + 1) * cells).reshape(-1, cells).astype(np.float64)


def _bootstrap(tables: Floats, resamples: int, rng: np.random.Generator) -> dict[str, Floats]:
    """Metric -> (resamples,) scores of as many dialogues, drawn with replacement."""
    count, cells = tables.shape
    classes = int(np.sqrt(cells))
    parts = []
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        drawn = rng.integers(0, count, (size, count)) + np.arange(size)[:, None] * count
        weights = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count).astype(np.float64)
        parts.append(_from_tables(weights @ tables, classes))
    return {name: np.concatenate([part[name] for part in parts]) for name in METRICS}


def _from_tables(sums: Floats, classes: int) -> dict[str, Floats]:
    """Metric -> (n,) from n confusion matrices (n, classes * classes), with the definitions of `Scores`."""
    matrices = sums.reshape(-1, classes, classes)
    hits = np.diagonal(matrices, axis1=1, axis2=2)
    support, answered = matrices.sum(axis=2), matrices.sum(axis=1)
    total = support.sum(axis=1)
    occurs = support > 0
    recall = hits / np.where(occurs, support, 1)
    f1 = 2 * hits / np.where(support + answered > 0, support + answered, 1)
    return {
        "wa": hits.sum(axis=1) / total,
        "ua": recall.sum(axis=1) / occurs.sum(axis=1),
        "weighted_f1": (f1 * support).sum(axis=1) / total,
        "macro_f1": f1.sum(axis=1) / (support + answered > 0).sum(axis=1),
    }
