"""An evaluation from activations: one run of the encoder per utterance, and the answers of a run without."""

import dataclasses
import logging
from pathlib import Path

import pytest
import torch

from mal_adapter import attach_memory
from mal_adapter.demo import ADAPTER_FOLDER, EMOTIONS, HOST_FOLDER, PROMPT
from mal_adapter.demo.run import load_demo
from mal_adapter.errors import ConfigError, EvaluationError
from mal_adapter.ser.dialogue import Dialogue
from mal_adapter.ser.evaluation import evaluate
from mal_adapter.ser.evaluation import evaluation as module
from mal_adapter.ser.evaluation.arms import ARMS
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
from tests.ser.evaluation.made_evaluations import make_control
from tests.ser.training_world import make_dialogues

LENGTHS = (4, 2, 3)


@pytest.fixture(scope="module")
def recognizer():
    return EmotionRecognizer(*load_demo(), EMOTIONS, PROMPT)


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    """Utterances of different lengths, and one without a sound file."""
    made = make_dialogues(tmp_path_factory.mktemp("calls"), LENGTHS, "dev")
    us = list(made[0].utterances)
    us[1] = dataclasses.replace(us[1], start_s=0.2, end_s=0.9)
    us[2] = dataclasses.replace(us[2], audio=us[2].audio.with_name("gone.wav"))
    return [Dialogue(made[0].dialogue_id, tuple(us)), *made[1:]]


class Whole:
    """In place of `SharedActivations`: each arm runs the whole host, as before there were activations."""

    def __init__(self, recognizer, *_, **__):
        self.of = lambda group: module.nullcontext(recognizer)


class Encoded:
    """Counts the rows that the host's audio encoder encodes."""

    def __init__(self, model):
        self.rows = 0
        (encoder,) = [part for name, part in model.named_modules() if name.endswith("audio_tower")]
        self.handle = encoder.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, module, args, kwargs):
        self.rows += len(args[0] if args else kwargs["input_features"])


@pytest.fixture
def encoded(recognizer):
    counted = Encoded(recognizer.model)
    yield counted
    counted.handle.remove()


def answers(evaluation):
    return {(row["dialogue_id"], row["utterance_id"]): row.get("arms", row.get("error")) for row in evaluation.answers}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_every_arm_answers_as_without_activations(
    recognizer, dialogues, tmp_path, encoded, monkeypatch, batch_size, caplog
):
    arguments = {"arms": list(ARMS), "control": make_control(recognizer.memory.adapter), "batch_size": batch_size}
    found = evaluate(recognizer, dialogues, output=tmp_path / "fast", **arguments)
    assert not caplog.records
    monkeypatch.setattr(module, "SharedActivations", Whole)
    expected = evaluate(recognizer, dialogues, output=tmp_path / "whole", **arguments)
    assert found.run == expected.run
    for key, arms in answers(expected).items():
        here = answers(found)[key]
        if isinstance(arms, str):
            assert here == arms
            assert "gone.wav" in arms
            continue
        assert here.keys() == arms.keys()
        for arm, probabilities in arms.items():
            assert here[arm] == pytest.approx(probabilities, abs=2e-6), arm
    surprises = [[row["surprise"] for row in evaluation.answers if "arms" in row] for evaluation in (found, expected)]
    assert surprises[0] == pytest.approx(surprises[1], rel=1e-4)
    assert not list(recognizer.memory.states)
    assert sorted(path.name for path in (tmp_path / "fast").iterdir()) == ["answers.jsonl", "evaluation.json"]


def test_the_encoder_runs_once_per_utterance(recognizer, dialogues, tmp_path, encoded):
    count = sum(LENGTHS) - 1  # one has no sound
    evaluate(recognizer, dialogues, output=tmp_path / "six")
    assert encoded.rows == count + 1  # the first one twice: its scores are compared with those of the whole host
    encoded.rows = 0
    evaluate(recognizer, dialogues, output=tmp_path / "one", arms=["own"])
    assert encoded.rows == count


def test_no_more_than_a_group_is_on_disk(recognizer, dialogues, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_GROUP", 1)
    there = []

    def counting(recognizer, group, *rest, **named):
        there.append([len(list(Path(tmp_path, "out", "parts", "activations-0").iterdir())), len(group[0].utterances)])
        return audit(recognizer, group, *rest, **named)

    audit = module.audit
    monkeypatch.setattr(module, "audit", counting)
    evaluate(recognizer, dialogues, output=tmp_path / "out", arms=["host_only", "own", "reset"])
    assert there == [[3, 4], [2, 2], [3, 3]]  # the utterance without sound has no file


def test_evaluations_can_share_a_folder_of_activations(recognizer, dialogues, tmp_path, encoded):
    shared = tmp_path / "shared"
    first = evaluate(recognizer, dialogues, output=tmp_path / "one", activations=shared)
    kept = {path: path.stat().st_mtime_ns for path in shared.iterdir()}
    assert len(kept) == sum(LENGTHS) - 1
    encoded.rows = 0
    again = evaluate(recognizer, dialogues, output=tmp_path / "two", activations=shared)
    assert {path: path.stat().st_mtime_ns for path in shared.iterdir()} == kept
    assert encoded.rows == 2  # the comparison
    assert again.answers == first.answers
    (tmp_path / "file").touch()
    with pytest.raises(EvaluationError, match="is a file"):
        evaluate(recognizer, dialogues, output=tmp_path / "three", activations=tmp_path / "file")
    plain = EmotionRecognizer(recognizer.model, recognizer.processor, None, EMOTIONS, PROMPT)
    with pytest.raises(ConfigError, match="no memory"):
        evaluate(plain, dialogues, output=tmp_path / "three", activations=shared)


def test_a_host_with_a_lora_runs_from_activations_of_its_own(dialogues, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model

    model, processor = load_host(str(HOST_FOLDER))
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    memory = attach_memory(model, adapter=ADAPTER_FOLDER)
    tuned = EmotionRecognizer(model, processor, memory, EMOTIONS, PROMPT)
    encoded = Encoded(model)
    arguments = {"arms": ["host_only", "own", "swapped"], "batch_size": 2}
    found = evaluate(tuned, dialogues[1:], output=tmp_path / "fast", **arguments)
    assert encoded.rows == sum(LENGTHS[1:]) + 1
    monkeypatch.setattr(module, "SharedActivations", Whole)
    expected = evaluate(tuned, dialogues[1:], output=tmp_path / "whole", **arguments)
    for key, arms in answers(expected).items():
        for arm, probabilities in arms.items():
            assert answers(found)[key][arm] == pytest.approx(probabilities, abs=2e-6), arm
    with pytest.raises(ConfigError, match="LoRA"):
        evaluate(tuned, dialogues[1:], output=tmp_path / "shared", activations=tmp_path / "kept")


def test_labels_of_several_tokens_run_the_whole_host_and_say_so_once(
    recognizer, dialogues, tmp_path, monkeypatch, caplog
):
    labels = ["neutral", "very happy", "angry and sad"]
    several = EmotionRecognizer(recognizer.model, recognizer.processor, recognizer.memory, labels, PROMPT)
    assert several.labels_need_cache
    us = [dataclasses.replace(u, emotion="neutral") for u in dialogues[1].utterances]
    ds = [Dialogue(us[0].dialogue_id, tuple(us)), *dialogues[2:]]
    monkeypatch.setattr(module, "_GROUP", 1)
    with caplog.at_level(logging.WARNING):
        found = evaluate(several, ds, output=tmp_path / "out", arms=["host_only", "own"])
    assert [record.getMessage() for record in caplog.records] == [
        "each arm runs the whole host, which takes several times as long: labels of several tokens need the cache of "
        "all layers"
    ]
    assert all("arms" in row for row in found.answers)


def test_a_host_that_can_not_run_from_activations_runs_whole_and_says_so_once(
    recognizer, dialogues, tmp_path, monkeypatch, caplog
):
    expected = evaluate(recognizer, dialogues, output=tmp_path / "expected", arms=["host_only", "own"])
    layer = recognizer.memory.decoder_layers[0]
    before = layer.forward
    layer.forward = lambda *args, **kwargs: before(*args, **kwargs)  # wrapped, as accelerate's offloading does
    try:
        with caplog.at_level(logging.WARNING):
            found = evaluate(recognizer, dialogues, output=tmp_path / "out", arms=["host_only", "own"])
    finally:
        del layer.forward
    (record,) = caplog.records
    assert "offloaded or wrapped" in record.getMessage()
    assert "cache_activations" not in record.getMessage()
    for key, arms in answers(expected).items():
        if isinstance(arms, dict):
            for arm, probabilities in arms.items():
                assert answers(found)[key][arm] == pytest.approx(probabilities, abs=2e-6)
