"""Scores follow scikit-learn's definitions, and resampling of dialogues agrees with a slow reference."""

import json
import sys
import time

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_adapter.errors import LabelError, MetricsError, MissingDependencyError
from mal_adapter.ser.evaluation import metrics
from mal_adapter.ser.evaluation.metrics import compare, difference_intervals, fold_intervals, score
from mal_adapter.ser.evaluation.scores import METRICS
from mal_adapter.ser.labels import IEMOCAP_4, MELD, LabelSet

ABC = LabelSet(("a", "b", "c"), {"x": "a"})


def reference(truth, answers):
    """The four scores by scikit-learn."""
    return {
        "wa": sklearn.metrics.accuracy_score(truth, answers),
        "ua": sklearn.metrics.balanced_accuracy_score(truth, answers),
        "weighted_f1": sklearn.metrics.f1_score(truth, answers, average="weighted", zero_division=0),
        "macro_f1": sklearn.metrics.f1_score(truth, answers, average="macro", zero_division=0),
    }


def made(utterances=400, dialogues=40, right=0.6, labels=MELD, seed=0, skew=True):
    """Truth, answers and dialogue ids. With `skew`, the classes are as uneven as those of a corpus."""
    rng = np.random.default_rng(seed)
    names = np.array(list(labels))
    shares = 0.5 ** np.arange(len(names)) if skew else np.ones(len(names))
    truth = rng.choice(names, utterances, p=shares / shares.sum())
    answers = np.where(rng.random(utterances) < right, truth, rng.choice(names, utterances))
    return truth.tolist(), answers.tolist(), [f"d{n % dialogues}" for n in range(utterances)]


answers_of = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from("abc"), st.integers(0, 4)), min_size=1, max_size=30
)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@given(rows=answers_of)
@settings(max_examples=200, deadline=None)
def test_scores_are_those_of_scikit_learn(rows):
    truth, answers, dialogues = map(list, zip(*rows, strict=True))
    result = score(truth, answers, dialogues, ABC, resamples=0)
    for name, value in reference(truth, answers).items():
        assert getattr(result, name) == pytest.approx(value, abs=1e-12), name
    assert result.confusion == tuple(
        map(tuple, sklearn.metrics.confusion_matrix(truth, answers, labels=list("abc")).tolist())
    )
    report = sklearn.metrics.classification_report(
        truth, answers, labels=list("abc"), output_dict=True, zero_division=0
    )
    for one in result.per_class:
        expected = report[one.label]
        assert (one.precision, one.recall, one.f1, one.support) == pytest.approx(
            (expected["precision"], expected["recall"], expected["f1-score"], expected["support"])
        )
    assert (result.utterances, result.dialogues) == (len(rows), len(set(dialogues)))


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@given(rows=answers_of)
@settings(max_examples=200, deadline=None)
def test_scores_from_tables_of_dialogues_are_the_same(rows):
    truth, answers, dialogues = (np.array(column) for column in zip(*rows, strict=True))
    ids = np.unique(dialogues, return_inverse=True)[1]
    numbers = [np.searchsorted(list("abc"), column) for column in (truth, answers)]
    tables = metrics._tables(numbers[0], numbers[1], ids, 3)
    fast = metrics._from_tables(tables.sum(axis=0, keepdims=True), 3)
    for name, value in reference(truth, answers).items():
        assert fast[name][0] == pytest.approx(value, abs=1e-12), name


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_the_bootstrap_agrees_with_drawing_utterances_one_by_one():
    """The same draws, done slowly: whole dialogues are copied, and scikit-learn scores the copies."""
    truth, answers, dialogues = made(90, dialogues=9)
    result = score(truth, answers, dialogues, MELD, resamples=150, seed=3)
    ids = list(dict.fromkeys(dialogues))
    rng = np.random.default_rng(3)
    slow = {name: [] for name in METRICS}
    for size in (100, 50):
        for draw in rng.integers(0, len(ids), (size, len(ids))):
            places = [place for n in draw for place, dialogue in enumerate(dialogues) if dialogue == ids[n]]
            for name, value in reference([truth[n] for n in places], [answers[n] for n in places]).items():
                slow[name].append(value)
    for name in METRICS:
        assert result.intervals[name] == pytest.approx(tuple(np.percentile(slow[name], (2.5, 97.5))), abs=1e-12)


def test_dialogues_are_drawn_not_utterances():
    truth = ["a"] * 100
    answers = ["a"] * 50 + ["b"] * 50
    low, high = score(truth, answers, [0] * 50 + [1] * 50, ABC).intervals["wa"]
    assert (low, high) == (0, 1)
    low, high = score(truth, answers, list(range(100)), ABC).intervals["wa"]
    assert 0.35 < low < 0.45 < 0.55 < high < 0.65
    low, high = score(truth, answers, [0] * 100, ABC).intervals["wa"]
    assert (low, high) == (0.5, 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_intervals_contain_the_score_and_narrow_with_the_data(seed):
    small, large = (score(*made(n, n // 10, seed=seed), MELD) for n in (300, 6000))
    for result in (small, large):
        for name, (low, high) in result.intervals.items():
            assert low <= getattr(result, name) <= high, name
    for name in METRICS:
        assert np.diff(large.intervals[name]) < np.diff(small.intervals[name]), name


def test_intervals_of_95_percent_cover_the_true_accuracy_about_that_often():
    hits = 0
    for seed in range(200):
        low, high = score(*made(300, 60, right=0.5, labels=ABC, skew=False, seed=seed), ABC, resamples=300).intervals[
            "wa"
        ]
        hits += low <= 0.5 + 0.5 / 3 <= high
    assert 180 <= hits <= 200


@given(data=st.data(), rows=answers_of)
@settings(max_examples=50, deadline=None)
def test_the_order_of_utterances_changes_no_score(data, rows):
    permuted = data.draw(st.permutations(rows))
    before, after = (
        score(*map(list, zip(*some, strict=True)), ABC, turns=[row[2] for row in some], resamples=0)
        for some in (rows, permuted)
    )
    assert before.to_dict() == after.to_dict()


def test_the_seed_chooses_the_intervals():
    one, same, other = (score(*made(), MELD, seed=seed).intervals for seed in (1, 1, 2))
    assert one == same != other


def test_aliases_count_as_their_label_and_unlabelled_utterances_are_left_out():
    result = score(
        ["hap", None, "EXC", "sad"], ["happy", "sad", "hap", "neu"], [1, 1, 1, 2], IEMOCAP_4, turns=[0, 1, 2, 0]
    )
    assert (result.utterances, result.wa) == (3, pytest.approx(2 / 3))
    assert [(at.turn, at.wa, at.support) for at in result.by_turn] == [(0, 0.5, 2), (2, 1.0, 1)]


def test_classes_that_do_not_occur_are_left_out_of_the_means():
    result = score(["a", "a", "a", "a"], ["a", "a", "a", "b"], [1, 1, 2, 2], ABC)
    assert result.ua == 0.75  # the recall of a alone
    assert result.macro_f1 == pytest.approx(
        (6 / 7 + 0) / 2
    )  # a and b; c occurs neither in the truth nor in the answers
    assert [(one.label, one.recall, one.support) for one in result.per_class] == [
        ("a", 0.75, 4),
        ("b", 0, 0),
        ("c", 0, 0),
    ]
    assert np.isfinite([*result.intervals["ua"], *result.intervals["macro_f1"]]).all()


def test_the_result_is_json_and_a_table():
    result = score(*made(), MELD, turns=[n % 10 for n in range(400)])
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain == result.to_dict()
    assert plain["labels"] == list(MELD)
    assert [len(row) for row in plain["confusion"]] == [7] * 7
    assert len(plain["by_turn"]) == 10
    text = str(result)
    assert "400 utterances of 40 dialogues" in text
    assert f"{result.weighted_f1:.4f}   95 % [{result.intervals['weighted_f1'][0]:.4f}, " in text
    assert all(f"\n{name} " in text for name in MELD)
    assert {len(line) for line in text.split("\n\n")[2].splitlines()[1:]} == {16 + 7 * 10}


@pytest.mark.parametrize(
    ("truth", "answers", "dialogues", "options", "error", "message"),
    [
        (["a"], ["a", "b"], [1], {}, MetricsError, "got 1 emotions, 2 answers and 1 dialogue ids"),
        (["a"], ["a"], [1, 2], {}, MetricsError, "got 1 emotions, 1 answers and 2 dialogue ids"),
        ([], [], [], {}, MetricsError, "none of the 0 utterances"),
        ([None, None], ["a", "a"], [1, 1], {}, MetricsError, "none of the 2 utterances has a true emotion"),
        (["a"], ["bored"], [1], {}, LabelError, "unknown label 'bored'"),
        (["bored"], ["a"], [1], {}, LabelError, "unknown label 'bored'"),
        (["a"], ["a"], [1], {"turns": [0, 1]}, MetricsError, "got 2 turns and 1 emotions"),
        (["a"], ["a"], [1], {"resamples": -1}, MetricsError, "at least 0, got -1"),
    ],
)
def test_input_that_cannot_be_scored_raises_a_typed_error(truth, answers, dialogues, options, error, message):
    with pytest.raises(error, match=message):
        score(truth, answers, dialogues, ABC, **options)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mal-adapter\[train\]'"):
        score(["a"], ["a"], [1], ABC)


# Comparisons


@given(rows=answers_of)
@settings(max_examples=50, deadline=None)
def test_a_system_does_not_differ_from_itself(rows):
    truth, answers, dialogues = map(list, zip(*rows, strict=True))
    for metric in METRICS:
        result = compare(truth, answers, answers, dialogues, ABC, metric=metric, resamples=50)
        assert (result.difference, result.p_value) == (0, 1)


@pytest.mark.parametrize("metric", METRICS)
def test_a_known_difference_is_significant_and_has_a_sign(metric):
    truth, worse, dialogues = made(800, 80, right=0.5)
    better = made(800, 80, right=0.65)[1]
    result = compare(truth, worse, better, dialogues, MELD, metric=metric, resamples=2000)
    assert result.difference > 0.05
    assert result.p_value < 0.01
    back = compare(truth, better, worse, dialogues, MELD, metric=metric, resamples=2000)
    assert back.difference == -result.difference
    assert back.p_value < 0.01
    assert result.first == pytest.approx(getattr(score(truth, worse, dialogues, MELD, resamples=0), metric))


def test_p_is_the_exact_share_of_exchanges():
    """With four dialogues, each better by the same, 2 of 16 exchanges are as extreme: all or none."""
    truth, first, second = ["a", "b"] * 4, ["a", "a"] * 4, ["a", "b"] * 4
    result = compare(truth, first, second, [n // 2 for n in range(8)], ABC, metric="wa", resamples=20_000)
    assert result.p_value == pytest.approx(2 / 16, abs=0.01)


def test_with_one_dialogue_p_is_one():
    truth, first, second = ["a", "b"] * 50, ["b"] * 100, ["a", "b"] * 50
    assert compare(truth, first, second, [0] * 100, ABC, resamples=200).p_value == 1


def test_equal_systems_are_rarely_significantly_different():
    small = 0
    for seed in range(200):
        truth, first, dialogues = made(120, 30, right=0.5, labels=ABC, skew=False, seed=seed)
        rng = np.random.default_rng(1000 + seed)
        second = np.where(rng.random(120) < 0.5, truth, rng.choice(list("abc"), 120)).tolist()
        small += compare(truth, first, second, dialogues, ABC, metric="wa", resamples=199).p_value <= 0.05
    assert small <= 20  # 10 are expected


def test_input_that_cannot_be_compared_raises_a_typed_error():
    with pytest.raises(MetricsError, match="unknown metric 'f1'; expected one of wa, ua, weighted_f1, macro_f1"):
        compare(["a"], ["a"], ["a"], [1], ABC, metric="f1")
    with pytest.raises(MetricsError, match="1 and 2 answers"):
        compare(["a"], ["a"], ["a", "b"], [1], ABC)
    with pytest.raises(MetricsError, match="at least 1, got 0"):
        compare(["a"], ["a"], ["a"], [1], ABC, resamples=0)
    result = compare(["a"], ["a"], ["b"], [1], ABC, resamples=10)
    assert json.loads(json.dumps(result.to_dict()))["metric"] == "weighted_f1"


@pytest.mark.slow
def test_ten_thousand_dialogues_take_seconds():
    truth, answers, dialogues = made(100_000, 10_000)
    start = time.process_time()  # CPU time, so that other processes do not count
    score(truth, answers, dialogues, MELD, resamples=1000)
    compare(truth, answers, truth, dialogues, MELD, resamples=1000)
    assert time.process_time() - start < 30


def test_paired_intervals_are_those_of_a_slow_bootstrap_over_clusters():
    truth, first, clusters = made(utterances=300, dialogues=12)
    second = made(utterances=300, dialogues=12, right=0.7)[1]
    found = difference_intervals(truth, first, second, clusters, MELD)
    rng = np.random.default_rng(1)
    rows = {name: [n for n, cluster in enumerate(clusters) if cluster == name] for name in set(clusters)}
    differences = []
    for _ in range(2000):
        drawn = [n for name in rng.choice(sorted(rows), len(rows)) for n in rows[name]]
        true = np.array(truth)[drawn]
        differences.append((np.array(second)[drawn] == true).mean() - (np.array(first)[drawn] == true).mean())
    assert found["wa"] == pytest.approx(tuple(np.percentile(differences, (2.5, 97.5))), abs=0.01)
    # What is hard for both systems does not widen a paired interval.
    assert difference_intervals(truth, first, first, clusters, MELD)["weighted_f1"] == (0.0, 0.0)


def test_a_paired_interval_has_the_difference_in_19_of_20_draws():
    inside = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        easy = rng.normal(0, 0.2, 30).repeat(10)  # a speaker is easier or harder for both systems
        truth = ["a"] * 300
        first, second = (np.where(rng.random(300) < 0.5 + gain + easy, "a", "b").tolist() for gain in (0.0, 0.1))
        low, high = difference_intervals(truth, first, second, [n // 10 for n in range(300)], ABC, resamples=400)["wa"]
        shares = np.clip(0.5 + 0.1 + easy, 0, 1) - np.clip(0.5 + easy, 0, 1)
        inside += low <= shares.mean() <= high
    assert inside >= 88


def test_an_interval_over_folds_needs_two():
    with pytest.raises(MetricsError, match="at least two"):
        fold_intervals(["a"], ["a"], ["a"], [0], ABC)
