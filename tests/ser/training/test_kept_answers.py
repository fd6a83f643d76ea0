"""Training a memory that keeps the host's answers, from the audio and from cached activations, with its control."""

import json

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from mal_adapter.demo import HOST_FOLDER, LAYER_IDX, PROMPT
from mal_adapter.memory.ensemble import load_adapter
from tests.commands import mal_adapter
from tests.ser.training_world import make_dialogues

SETTINGS = {"epochs": 2, "learning_rate": 0.01, "batch_size": 2, "memory": {"memory_dim": 16, "num_heads": 1}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    make_dialogues(folder / "train", (3, 2))
    make_dialogues(folder / "dev", (2, 3), "dev")
    return folder


def run(*arguments):
    AcceleratorState._reset_state()
    done = mal_adapter(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def train(corpus, output, *options, **memory):
    settings = {**SETTINGS, "memory": {**SETTINGS["memory"], **memory}}
    (corpus / "settings.json").write_text(json.dumps(settings))
    manifests = corpus / "train" / "manifest.jsonl", "--dev", corpus / "dev" / "manifest.jsonl"
    host = "--model", HOST_FOLDER, "--layer", LAYER_IDX, "--prompt", PROMPT, "--config", corpus / "settings.json"
    return run("train", *manifests, *host, "--output", output, *options)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "memory"
    return output, train(corpus, output, "--keep-answers", "--with-control")


def test_the_option_sets_the_number_of_labels_and_their_part_learns(trained):
    output, report = trained
    adapter, control = load_adapter(output), load_adapter(output / "control")
    assert report["memory"]["num_labels"] == adapter.config.num_labels == len(report["labels"])
    assert adapter.answers.out_proj.weight.any()
    assert (control.config.update, control.config.num_labels) == ("none", adapter.config.num_labels)
    assert not control.answers.out_proj.weight.any()


def test_update_answers_needs_no_other_option(corpus, tmp_path):
    report = train(corpus, tmp_path / "answers", "--update", "answers")
    assert (report["memory"]["update"], report["memory"]["num_labels"]) == ("answers", len(report["labels"]))


@pytest.mark.slow
def test_cached_activations_train_the_same_memory(corpus, trained, tmp_path):
    output, report = trained
    cached = train(corpus, tmp_path / "cached", "--activations", tmp_path / "activations", "--keep-answers")
    for one, other in zip(report["epochs"], cached["epochs"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one["dev"]["loss"] == pytest.approx(other["dev"]["loss"], abs=1e-4)
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (output, tmp_path / "cached"))
    name = "answers.out_proj.weight"
    assert float((mine[name] - theirs[name]).abs().max()) < 1e-2 * float(mine[name].abs().max())


def test_the_evaluation_reads_its_own_and_other_pasts_and_the_control(corpus, trained, tmp_path):
    output, _ = trained
    arms = "host_only,own,other_dialogues,shuffled,control"
    test = corpus / "dev" / "manifest.jsonl"
    live, cached = (
        run(
            "evaluate",
            test,
            "--model",
            HOST_FOLDER,
            "--adapter",
            output,
            "--arms",
            arms,
            "--output",
            tmp_path / name,
            *o,
        )
        for name, o in (("live", ()), ("cached", ("--activations", tmp_path / "activations")))
    )
    for arm in arms.split(","):
        assert live["arms"][arm]["wa"] == cached["arms"][arm]["wa"]


def test_a_wrong_number_of_labels_is_refused(corpus, tmp_path):
    done = None
    with pytest.raises(AssertionError, match="keeps the host's answers out of the 7 labels"):
        done = train(corpus, tmp_path / "other", num_labels=7)
    assert done is None
    assert not (tmp_path / "other" / "model.safetensors").exists()
