"""The arm "control": the control's answers, whatever came before; and from `train --with-control` to the verdict."""

import dataclasses
import json
import re

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from typer.testing import CliRunner

from mal_adapter import MemoryAdapter, attach_memory
from mal_adapter.cli import app
from mal_adapter.demo import EMOTIONS, HOST_FOLDER, PROMPT
from mal_adapter.demo.run import load_demo
from mal_adapter.errors import ConfigError, SessionError
from mal_adapter.ser.evaluation import evaluate
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
from tests.ser.evaluation.made_evaluations import make_control
from tests.ser.training_world import make_dialogues

ARMS = ["host_only", "control", "own", "reset"]


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    return make_dialogues(tmp_path_factory.mktemp("calls"), (4, 2, 3), "dev")


@pytest.fixture(scope="module")
def recognizer():
    return EmotionRecognizer(*load_demo(), EMOTIONS, PROMPT)


def test_the_arm_has_the_answers_of_the_control_alone_and_changes_no_other(recognizer, dialogues, tmp_path):
    memory = recognizer.memory
    control = make_control(memory.adapter)
    found = evaluate(recognizer, dialogues, output=tmp_path / "out", control=control, arms=ARMS, batch_size=2)
    without = evaluate(recognizer, dialogues, output=tmp_path / "without", arms=["host_only", "own", "reset"])
    assert (found.run["control"], without.run["control"]) == (control.fingerprint(), None)
    model, processor = load_host(str(HOST_FOLDER))
    alone = EmotionRecognizer(model, processor, attach_memory(model, adapter=control), EMOTIONS, PROMPT)
    expected = {
        (result.utterance.dialogue_id, result.utterance.utterance_id): result.probabilities
        for dialogue in dialogues
        for result in alone.recognize(dialogue)  # with the past of the dialogue, which a control does not read
    }
    differs = 0
    for row, other in zip(found.answers, without.answers, strict=True):
        arms = row["arms"]
        assert list(arms) == ARMS
        assert arms["control"] == pytest.approx(expected[row["dialogue_id"], row["utterance_id"]], abs=1e-5)
        differs += arms["control"] != pytest.approx(arms["reset"], abs=1e-3)
        for arm in ("host_only", "own", "reset"):
            assert arms[arm] == pytest.approx(other["arms"][arm], abs=1e-5)
    assert differs
    assert recognizer.memory.adapter is memory.adapter is not control
    assert len(memory.states) == 0


def test_a_session_of_a_control_counts_in_every_store_and_answers_the_same_each_time(dialogues, tmp_path):
    control = make_control(load_demo()[2].adapter)
    model, processor = load_host(str(HOST_FOLDER))
    with attach_memory(model, adapter=control, store=tmp_path / "states") as memory:
        recognizer = EmotionRecognizer(model, processor, memory, EMOTIONS, PROMPT)
        first = dialogues[0].utterances[0]
        answers = [recognizer.answer([first], session_ids=["call"])[0].probabilities for _ in range(3)]
        assert answers[1] == answers[2] == answers[0]
        assert memory.states["call"].utterances.item() == 3
    with attach_memory(model, adapter=control, store=tmp_path / "states") as memory:  # as another process would
        assert memory.states["call"].utterances.item() == 3
        assert memory.status()["training"] is False


def changed(control, **metadata):
    control.metadata = dataclasses.replace(control.metadata, **metadata)
    return control


@pytest.mark.parametrize(
    ("make", "arms", "words"),
    [
        (lambda memory: memory, ARMS, "update='titans'.*--with-control"),
        (lambda memory: make_control(memory, depth=1), ARMS, "depth is 1 and the memory's 2"),
        (lambda memory: changed(make_control(memory), layer_idx=0), ARMS, "layer is 0 and the memory's 1"),
        (lambda memory: changed(make_control(memory), task={"labels": ["a", "b"]}), ARMS, "labels"),
        (lambda memory: None, ARMS, "needs a control; train one with mal-adapter train --with-control"),
        (make_control, ["host_only", "own"], "'control' is not among the arms"),
    ],
)
def test_what_is_no_control_of_this_memory_is_refused(recognizer, dialogues, tmp_path, make, arms, words):
    control = make(recognizer.memory.adapter)
    with pytest.raises(ConfigError, match=words):
        evaluate(recognizer, dialogues, output=tmp_path / "out", control=control, arms=arms)
    assert not (tmp_path / "out").exists()


def test_another_adapter_is_used_within_the_block_only(recognizer):
    memory = recognizer.memory
    own, control = memory.adapter, make_control(memory.adapter)
    with memory.using(control):
        assert memory.adapter is control
    assert memory.adapter is own
    with pytest.raises(ZeroDivisionError), memory.using(control):
        raise ZeroDivisionError
    assert memory.adapter is own
    with memory.session("open"), pytest.raises(SessionError, match="open already"), memory.using(control):
        pass
    narrow = make_control(own)
    narrow.metadata = dataclasses.replace(narrow.metadata, layer_idx=0)
    with pytest.raises(ConfigError, match="layer 0"), memory.using(narrow):
        pass


def run(*arguments):
    AcceleratorState._reset_state()
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_memory_and_its_control_by_commands(tmp_path):
    for split, lengths in (("train", (4, 2, 3)), ("dev", (3, 2, 4, 2, 3, 4))):
        make_dialogues(tmp_path / split, lengths, split)
    settings = {"epochs": 1, "batch_size": 2, "memory": {"memory_dim": 16, "num_heads": 2, "dropout": 0.1}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    train = ["train", tmp_path / "train" / "manifest.jsonl", "--model", HOST_FOLDER, "--layer", "1"]
    train += ["--labels", "neutral,happy,angry,sad", "--config", tmp_path / "settings.json", "--seed", "3"]
    done = run(*train, "--with-control", "--activations", tmp_path / "shared", "--output", tmp_path / "both", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    reports = json.loads(done.stdout)
    assert (reports["memory"]["update"], reports["control"]["memory"]["update"]) == ("titans", "none")
    assert reports["control"]["output"] == str(tmp_path / "both" / "control")
    assert reports["dialogues"] == reports["control"]["dialogues"]
    alone = run(*train, "--update", "none", "--activations", tmp_path / "shared", "--output", tmp_path / "alone")
    assert alone.exit_code == 0, (alone.output, alone.exception)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("both/control", "alone"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert MemoryAdapter.from_pretrained(tmp_path / "both").config.update == "titans"
    again = run(
        *train, "--with-control", "--resume", "--activations", tmp_path / "shared", "--output", tmp_path / "both"
    )
    assert again.exit_code == 0, (again.output, again.exception)
    assert again.stdout.count("saved in") == 2

    test = ["evaluate", tmp_path / "dev" / "manifest.jsonl", "--adapter", tmp_path / "both", "--model", HOST_FOLDER]
    done = run(*test, "--output", tmp_path / "eval", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    figures = json.loads(done.stdout)
    assert list(figures["arms"])[:3] == ["host_only", "control", "own"]
    assert "over the control (95 %" in figures["verdict"]
    given = run(
        *test, "--control", tmp_path / "alone", "--arms", "own,control", "--output", tmp_path / "given", "--json"
    )
    assert json.loads(given.stdout)["arms"]["control"]["wa"] == figures["arms"]["control"]["wa"]
    predicted = run(
        "predict", tmp_path / "dev" / "manifest.jsonl", "--adapter", tmp_path / "alone", "--model", HOST_FOLDER
    )
    assert predicted.exit_code == 0, (predicted.output, predicted.exception)

    for more, words in (
        (["--with-control", "--update", "none"], "the control itself"),
        (["--with-control", "--lora-rank", "2"], "LoRA"),
        (["--update", "lstm"], "not one of titans"),
    ):
        done = run(*train, *more, "--output", tmp_path / "none")
        assert isinstance(done.exception, ConfigError)
        assert re.search(words, str(done.exception))
    (tmp_path / "alone" / "lora").mkdir()
    done = run(*test, "--control", tmp_path / "alone", "--output", tmp_path / "lora")
    assert isinstance(done.exception, ConfigError)
    assert "LoRA of its own" in str(done.exception)
