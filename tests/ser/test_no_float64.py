"""Recognising, evaluating and training on a device without float64."""

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import _disable_current_modes

from mal_adapter.ser.evaluation import evaluate
from mal_adapter.ser.recognizer.prompt import AudioPrompt
from tests.no_float64 import NoFloat64
from tests.ser.training_world import make_dialogues, make_recognizer, parameters_of, run

SEVERAL_TOKENS = ("neutral", "happiness", "angry", "sadness")


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    return make_dialogues(tmp_path_factory.mktemp("dialogues"), (2, 3))


@pytest.fixture(autouse=True)
def _any_precision():
    AcceleratorState._reset_state()


@pytest.fixture(autouse=True)
def _processor_on_the_cpu(monkeypatch):
    """A processor makes its features before they go to the device, and may use float64."""
    prompt = AudioPrompt.__call__

    def call(self, waveforms):
        with _disable_current_modes():
            return prompt(self, waveforms)

    monkeypatch.setattr(AudioPrompt, "__call__", call)


def test_answers_are_those_of_a_device_with_float64(dialogues):
    def answers():
        recognizer = make_recognizer(random=True, labels=SEVERAL_TOKENS)
        assert recognizer.labels_need_cache
        return [list(result.probabilities.values()) for result in recognizer.recognize_many(dialogues)]

    expected = answers()
    with NoFloat64():
        found = answers()
    assert len(found) == 5
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-5)


def test_training_learns_the_same(dialogues, tmp_path):
    recognizer, report = run(tmp_path / "with", dialogues, dialogues[:1])
    with NoFloat64():
        other, other_report = run(tmp_path / "without", dialogues, dialogues[:1])
    expected, found = parameters_of(recognizer), parameters_of(other)
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-3, atol=1e-4)
    with NoFloat64():
        evaluated = evaluate(other, dialogues, output=tmp_path / "evaluated")
    assert len(evaluated.answers) == 5
    assert type(report) is type(other_report)
