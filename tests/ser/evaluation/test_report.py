"""Reports: figures computed by hand, evaluations that do not fit together, and the page in a browser."""

import html
import json
import re
import shutil
import subprocess

import pytest

from mal_adapter.errors import EvaluationError, MetricsError
from mal_adapter.ser.evaluation.report import card_entry, figures_of, pooled, write_report
from mal_adapter.ser.evaluation.verdict import Finding, finding_of
from tests.ser.evaluation.made_evaluations import RIGHT, made_evaluation


def test_figures_are_computed_from_the_answers():
    figures = figures_of(made_evaluation())
    assert {arm: scores["wa"] for arm, scores in figures["arms"].items()} == {
        arm: hits.count("1") / 4 for arm, hits in RIGHT.items()
    }
    assert figures["audit"] == {"reset": 1.0, "swapped": 1.5, "other_dialogues": 1.0}
    assert [row["gain"] for row in figures["gain_by_turn"]] == [0, 1, 0, 1]
    compared = {entry["first"]: entry["wa"] for entry in figures["compared"]}
    assert compared["host_only"]["difference"] == 0.5
    assert compared["oracle_speakers"]["p_value"] == 1.0
    assert finding_of(figures) is Finding.SPECIFIC_GAIN
    reliability = figures["arms"]["own"]["reliability"]
    assert sum(b["count"] for b in reliability["bins"]) == 48
    # confidences are 0.6 … 0.75, and all answers are correct
    assert reliability["expected_calibration_error"] == pytest.approx(1 - 0.675)
    entry = card_entry(figures, "MELD", "test")
    assert (entry["metrics"]["accuracy"], entry["host_metrics"]["accuracy"]) == (1.0, 0.5)


def with_copied_arm(source, target):
    """An evaluation in which `target` gives the answers of `source`."""
    evaluation = made_evaluation()
    for row in evaluation.answers:
        row["arms"][target] = row["arms"][source]
    return evaluation


@pytest.mark.parametrize(
    ("evaluation", "finding", "named"),
    [
        (made_evaluation(), Finding.SPECIFIC_GAIN, ["+50.0", "reset, swapped and other_dialogues"]),
        (with_copied_arm("own", "swapped"), Finding.UNSPECIFIC_GAIN, ["+50.0", "accuracy of swapped is not"]),
        (made_evaluation(arms=["host_only", "own", "shuffled"]), Finding.UNTESTED_GAIN, ["+50.0"]),
        (
            made_evaluation(arms=["host_only", "control", "own", "reset"]),
            Finding.SPECIFIC_GAIN,
            [
                "+50.0 points of accuracy over the control (95 %: +50.0 to +50.0 over 12 dialogues; too few",
                "of reset is",
            ],
        ),
        (
            made_evaluation(arms=["host_only", "own", "reset"]),
            Finding.UNCONTROLLED_GAIN,
            ["+50.0", "accuracy of reset is", "mal-adapter train --with-control", "--control"],
        ),
        (with_copied_arm("own", "control"), Finding.READOUT_GAIN, ["+0.0 points of accuracy over the control", "+50"]),
        (made_evaluation(dialogues=2), Finding.NO_GAIN, ["+50.0"]),  # too few for 5 %
        (with_copied_arm("host_only", "own"), Finding.NO_GAIN, ["+0.0", "p = 1.0000"]),
        (with_copied_arm("history", "own"), Finding.NO_GAIN, ["-50.0"]),  # significantly worse
    ],
)
def test_the_verdict_does_not_say_more_than_was_shown(evaluation, finding, named):
    figures = figures_of(evaluation)
    assert finding_of(figures) is finding
    assert finding_of(json.loads(json.dumps(figures))) is finding
    assert figures["verdict"].startswith(finding.value)
    assert [words for words in named if words not in figures["verdict"]] == []


def of_speakers(evaluation, count):
    """The same with so many speakers, two in each dialogue."""
    for row in evaluation.answers:
        row["speaker"] = f"s{(int(row['dialogue_id'][1:]) + row['turn'] % 2) % count}"
    return evaluation


def with_gain_for(evaluation, favoured):
    """An evaluation whose control is as good as the memory, except for `favoured` rows."""
    for row in evaluation.answers:
        row["arms"]["control"] = row["arms"]["host_only" if favoured(row) else "own"]
    return evaluation


def test_a_gain_of_few_speakers_is_not_a_gain():
    # 48 dialogues show it, but it is that of one speaker out of eight
    one = with_gain_for(of_speakers(made_evaluation(dialogues=48), 8), lambda row: row["speaker"] == "s3")
    figures = figures_of(one)
    assert figures["clusters"] == {"dialogues": 48, "speakers": 8}
    (entry,) = [entry for entry in figures["compared"] if entry["first"] == "control"]
    assert entry["wa"]["p_value"] <= 0.05
    assert entry["intervals"]["dialogues"]["wa"][0] > 0 >= entry["intervals"]["speakers"]["wa"][0]
    assert finding_of(figures) is Finding.READOUT_GAIN
    assert "over 48 dialogues; +0.0 to" in figures["verdict"]
    all_of_them = figures_of(with_gain_for(of_speakers(made_evaluation(dialogues=48), 8), lambda row: True))
    assert finding_of(all_of_them) is Finding.SPECIFIC_GAIN
    assert "over 8 speakers" in all_of_them["verdict"]


def test_with_few_speakers_the_interval_is_over_folds():
    folds = [made_evaluation(f"fold{n}", 8, first=8 * n) for n in range(3)]
    figures = figures_of(pooled(folds))
    assert figures["clusters"] == {"dialogues": 24, "folds": 3}
    assert finding_of(figures) is Finding.SPECIFIC_GAIN
    with_gain_for(folds[0], lambda row: False)
    with_gain_for(folds[1], lambda row: False)
    figures = figures_of(pooled(folds))
    (entry,) = [entry for entry in figures["compared"] if entry["first"] == "control"]
    # 0, 0 and 0.5: a mean of 1/6, and t of two degrees of freedom
    half = 4.302653 * (0.5 / 3**0.5) / 3**0.5
    assert entry["intervals"]["folds"]["wa"] == pytest.approx([1 / 6 - half, 1 / 6 + half], abs=1e-5)
    assert finding_of(figures) is Finding.READOUT_GAIN
    assert "over 3 folds" in figures["verdict"]


def test_the_gain_by_turn_is_over_the_control_if_there_is_one():
    control = made_evaluation(arms=["host_only", "control", "own"])
    for row in control.answers:
        row["arms"]["control"] = row["arms"]["own"]
    figures = figures_of(control)
    assert figures["gain_over"] == "control"
    assert [row["gain"] for row in figures["gain_by_turn"]] == [0, 0, 0, 0]
    assert figures_of(made_evaluation(arms=["host_only", "own"]))["gain_over"] == "host_only"
    assert figures_of(made_evaluation(arms=["host_only"]))["gain_over"] is None


def test_the_audit_gives_the_share_of_the_gain_that_is_lost():
    assert figures_of(made_evaluation())["audit"] == {"reset": 1.0, "swapped": 1.5, "other_dialogues": 1.0}
    without_gain = figures_of(with_copied_arm("host_only", "own"))
    assert without_gain["audit"] == {"reset": None, "swapped": None, "other_dialogues": None}


@pytest.mark.parametrize("arms", [["own"], ["host_only"], ["own", "reset"], ["host_only", "history"]])
def test_without_the_host_alone_or_the_own_past_there_is_no_verdict(arms):
    figures = figures_of(made_evaluation(arms=arms))
    assert finding_of(figures) is None
    assert figures["verdict"] == ""


def test_folds_are_reported_as_one_evaluation():
    whole = pooled([made_evaluation("one", 3), made_evaluation("two", 5, first=3, fingerprint="4567")])
    assert figures_of(whole)["arms"]["own"]["dialogues"] == 8
    assert whole.run["fingerprint"] == ["0123", "4567"]
    with pytest.raises(EvaluationError, match="'d2' is in one and in two"):
        pooled([made_evaluation("one", 3), made_evaluation("two", 5, first=2)])
    with pytest.raises(EvaluationError, match="labels"):
        pooled([made_evaluation("one", 3), made_evaluation("two", 5, first=3, labels=["neutral", "angry"])])
    with pytest.raises(EvaluationError, match="no evaluation"):
        pooled([])


def test_other_systems_are_compared_on_the_same_utterances():
    gru = made_evaluation("gru")
    for row in gru.answers:
        row["arms"] = {"own": row["arms"]["shuffled"]}
    gru.run["arms"] = ["own"]
    figures = figures_of(made_evaluation(), [gru])
    assert figures["against"]["gru"]["wa"] == 0.75
    assert {entry["first"]: entry["wa"]["difference"] for entry in figures["compared"]}["gru"] == 0.25
    with pytest.raises(EvaluationError, match="d11/0 is not in it"):
        figures_of(made_evaluation(), [made_evaluation("fewer", 11)])
    gru.answers[0]["truth"] = "sad"
    with pytest.raises(EvaluationError, match="d0/0 is sad in it and neutral here"):
        figures_of(made_evaluation(), [gru])
    with pytest.raises(EvaluationError, match="name 'own'"):
        figures_of(made_evaluation(), [made_evaluation("own")])


def test_without_labelled_utterances_no_report_is_written(tmp_path):
    none = made_evaluation()
    for row in none.answers:
        row["truth"] = None
    with pytest.raises(MetricsError):
        write_report(tmp_path / "out", [none])
    assert not (tmp_path / "out").exists()


def in_browser(page, *options):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    command = [
        chromium,
        "--headless",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        *options,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def test_a_browser_shows_every_plot_and_logs_nothing(tmp_path):
    hostile = made_evaluation(host="org/<script>alert(1)</script>")
    hostile.answers[0] = {**hostile.answers[0], "speaker": r"$\no$<script>alert(1)</script>"}
    hostile.answers.append(
        {
            "dialogue_id": "x",
            "utterance_id": "0",
            "turn": 1,
            "speaker": "A",
            "truth": "sad",
            "error": "<img src=gone.png>",
        }
    )
    write_report(tmp_path, [hostile], [made_evaluation("<b>gru</b>")])
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)  # no other file is loaded
    assert "@import" not in page
    shown = in_browser(tmp_path / "report.html", "--dump-dom", f"--user-data-dir={tmp_path / 'profile'}")
    assert "CONSOLE" not in shown.stderr, shown.stderr
    titles = re.findall(r'role="img" aria-label="([^"]+)"[^>]*><svg', shown.stdout)
    assert titles == [
        "Gain by turn", "Accuracy by arm", "Confusion", "Reliability", "A dialogue's timeline"
    ]  # fmt: skip
    assert "<script" not in shown.stdout
    text = html.unescape(re.sub(r"<[^>]+>", " ", shown.stdout))
    for words in (
        Finding.SPECIFIC_GAIN.value,
        "with memory",
        "gain in accuracy",
        "surprise",
        "<b>gru</b>",
        "<img src=gone.png>",
    ):
        assert words in text
    shot = tmp_path / "page.png"
    in_browser(tmp_path / "report.html", f"--screenshot={shot}", f"--user-data-dir={tmp_path / 'profile'}")
    assert shot.stat().st_size > 20_000


def test_the_table_has_the_intervals_of_the_differences(tmp_path):
    figures = write_report(tmp_path, [of_speakers(made_evaluation(dialogues=24), 8)])
    page = (tmp_path / "report.html").read_text()
    for entry in figures["compared"]:
        for kind, bounds in entry["intervals"].items():
            low, high = bounds["wa"]
            assert f"<small>{kind} {low:+.3f} to {high:+.3f}</small>" in page
    assert "bootstraps over 24 dialogues and over 8 speakers" in page


def test_one_arm_is_enough_for_a_report(tmp_path):
    host_only = made_evaluation(arms=["host_only"], memory=None, fingerprint=None, layer_idx=None)
    for row in host_only.answers:
        row["arms"], row["surprise"] = {"host_only": row["arms"]["host_only"]}, None
    figures = write_report(tmp_path, [host_only])
    assert (figures["verdict"], figures["audit"], figures["gain_by_turn"]) == ("", {}, [])
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 3
    assert json.loads((tmp_path / "report.json").read_text()) == figures
