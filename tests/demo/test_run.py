"""The demonstration: WAV files, the shipped host and memory, and a report that counts its own answers."""

import json
import re

import numpy as np
import pytest
from matplotlib import rc_context
from typer.testing import CliRunner

from mal_adapter.cli import app
from mal_adapter.cli.demo import painted as painted_report
from mal_adapter.demo.run import bootstrap_interval, describe_report, load_demo, plot_report, run_demo

KEYS = {
    "accuracy_without_memory",
    "accuracy_with_memory",
    "by_turn_without_memory",
    "by_turn_with_memory",
    "intervals",
    "dialogues",
    "seed",
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_demo(20, 3, tmp_path_factory.mktemp("wavs"), progress=False)


def test_the_memory_helps_and_both_figures_are_counted_from_the_answers(report):
    figures = report.to_dict()
    for key, rows in (("without", report.without), ("with", report.with_memory)):
        right = [p.label == p.utterance.emotion for row in rows for p in row]
        assert len(right) == 200
        assert figures[f"accuracy_{key}_memory"] == pytest.approx(sum(right) / 200)
        assert np.mean(figures[f"by_turn_{key}_memory"]) == pytest.approx(figures[f"accuracy_{key}_memory"])
        low, high = figures["intervals"][f"accuracy_{key}_memory"]
        assert low <= figures[f"accuracy_{key}_memory"] <= high
    assert figures["accuracy_with_memory"] >= figures["accuracy_without_memory"] + 0.10


def test_the_text_shows_every_turn_and_both_accuracies(report):
    text = describe_report(report)
    for prediction in report.with_memory[0]:
        assert f"{prediction.label} {prediction.probabilities[prediction.label]:.2f}" in text
    for accuracy in ("accuracy_without_memory", "accuracy_with_memory"):
        assert f"{report.to_dict()[accuracy]:.3f}" in text


def test_without_its_colours_the_painted_text_is_the_report(report):
    text = describe_report(report)
    painted = painted_report(text)
    assert re.sub("\x1b\\[[0-9]*m", "", painted) == text
    predictions = [*report.without[0], *report.with_memory[0]]
    right = sum(prediction.label == prediction.utterance.emotion for prediction in predictions)
    assert (painted.count("\x1b[32m"), painted.count("\x1b[31m")) == (right, len(predictions) - right)


def test_the_plot_shows_the_figures_of_the_report(report, tmp_path):
    with rc_context({"svg.fonttype": "none"}):
        plot_report(report, tmp_path / "demo.svg")
    drawing = (tmp_path / "demo.svg").read_text()
    assert drawing.startswith("<?xml")
    for accuracy in ("accuracy_without_memory", "accuracy_with_memory"):
        assert f">{100 * report.to_dict()[accuracy]:.0f} % of all<" in drawing
    first = [*report.without[0], *report.with_memory[0]]
    assert drawing.count("✗") == sum(p.label != p.utterance.emotion for p in first) > 0
    plot_report(report, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_one_json_object(tmp_path):
    done = CliRunner().invoke(app, ["demo", "--dialogues", "2", "--seed", "5", "--json"])
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert set(figures) == KEYS
    assert (figures["dialogues"], figures["seed"]) == (2, 5)


@pytest.mark.parametrize("plot", ["absent/demo.png", "demo.txt"])
def test_a_plot_that_cannot_be_written_is_refused_before_the_work(tmp_path, plot):
    done = CliRunner().invoke(app, ["demo", "--plot", str(tmp_path / plot)])
    assert done.exit_code == 2
    assert "--plot" in done.output


def test_the_interval_of_identical_dialogues_has_no_width():
    assert bootstrap_interval(np.full((5, 10), 0.5)) == [0.5, 0.5]
    low, high = bootstrap_interval(np.repeat([[0.0], [1.0]], 50, axis=0))
    assert 0.35 < low < 0.45
    assert 0.55 < high < 0.65


def test_the_shipped_memory_belongs_to_the_shipped_host():
    model, _, memory = load_demo()
    with memory:
        assert memory.adapter.metadata.task["labels"] == ["neutral", "happy", "angry", "sad"]
        assert memory.adapter.metadata.num_hidden_layers == model.config.text_config.num_hidden_layers
        assert not memory.adapter.training
