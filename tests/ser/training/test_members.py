"""`train --members N`: N separate trainings to the bit, one adapter; and what the commands do with it."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from typer.testing import CliRunner

from mal_adapter import MemoryConfig, MemoryEnsemble
from mal_adapter.cli import app
from mal_adapter.demo import EMOTIONS, HOST_FOLDER, LAYER_IDX, PROMPT
from mal_adapter.errors import ConfigError, TrainingError
from mal_adapter.memory.ensemble import load_adapter
from mal_adapter.ser.evaluation import evaluate, read_evaluation
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
from mal_adapter.ser.training import TrainingConfig, train_members, train_memory
from mal_adapter.ser.training.cached_host import CachedHost
from tests.ser.training_world import FAST, make_dialogues, make_recognizer

SETTINGS = {
    "epochs": 1, "batch_size": 2, "window": 3, "learning_rate": 0.01, "cache_activations": True,
    "memory": {"memory_dim": 16, "num_heads": 2},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _any_precision():
    AcceleratorState._reset_state()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    make_dialogues(folder / "train", (3, 2))
    make_dialogues(folder / "dev", (2, 3), "dev")
    (folder / "settings.json").write_text(json.dumps(SETTINGS))
    return folder


def run(*arguments) -> str:
    AcceleratorState._reset_state()
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def train(corpus, output, *options) -> dict:
    arguments = [
        corpus / "train" / "manifest.jsonl",
        "--dev",
        corpus / "dev" / "manifest.jsonl",
        "--model",
        HOST_FOLDER,
    ]
    arguments += ["--layer", LAYER_IDX, "--config", corpus / "settings.json", "--prompt", PROMPT, "--output", output]
    return json.loads(run("train", *arguments, *options, "--json"))


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "memory"
    return output, train(corpus, output, "--members", 2, "--seed", 5, "--with-control")


def test_members_are_the_separate_trainings_to_the_bit(corpus, trained, tmp_path):
    output, report = trained
    whole = load_file(output / "model.safetensors")
    for index, seed in enumerate((5, 6)):
        alone = train(corpus, tmp_path / str(seed), "--seed", seed)
        expected = load_file(tmp_path / str(seed) / "model.safetensors")
        assert expected.keys() == load_file(output / "members" / str(index) / "model.safetensors").keys()
        assert len(whole) == 2 * len(expected)
        assert all(torch.equal(whole[f"members.{index}.{name}"], tensor) for name, tensor in expected.items())
        mine = report["members"][index]
        assert mine["config"] == {**alone["config"], "seed": seed}
        assert mine["epochs"] == alone["epochs"]
    assert json.loads((output / "training.json").read_text())["members"] == report["members"]
    assert len(list((output / "activations").iterdir())) == 10  # utterances of training and dev, once for all
    control = load_adapter(output / "control")
    assert ([m.config.update for m in control.members], len(report["control"]["members"])) == (["none"] * 2, 2)
    assert "It has 2 members" in (output / "README.md").read_text()


def test_a_stopped_training_resumes(corpus, trained, tmp_path, monkeypatch):
    output, _ = trained
    calls, step = [0], torch.optim.AdamW.step

    def stop_in_the_second(*args, **kwargs):
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    manifests = ["train", corpus / "train" / "manifest.jsonl", "--dev", corpus / "dev" / "manifest.jsonl"]
    options = ["--model", HOST_FOLDER, "--layer", LAYER_IDX, "--config", corpus / "settings.json", "--prompt", PROMPT]
    options += ["--members", 2, "--seed", 5, "--output", tmp_path / "again"]
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stop_in_the_second)
        result = CliRunner().invoke(app, list(map(str, manifests + options)))
    assert result.exit_code != 0
    assert (tmp_path / "again" / "members" / "0" / "model.safetensors").exists()
    assert not (tmp_path / "again" / "model.safetensors").exists()
    run(*manifests, *options, "--resume")
    again, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", output))
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    run(*manifests, *options, "--resume")  # a complete one stays as it is
    assert load_adapter(tmp_path / "again").fingerprint() == load_adapter(output).fingerprint()


def test_what_cannot_be_trained_is_said_before_anything_runs(corpus, trained, tmp_path):
    output, _ = trained
    model, processor = load_host(str(HOST_FOLDER))
    dialogues = make_dialogues(tmp_path / "wav", (2, 2))
    options = {
        "members": 2,
        "labels": EMOTIONS,
        "prompt": PROMPT,
        "config": FAST,
        "memory": MemoryConfig(memory_dim=16),
    }
    for changes, expected in (
        ({"members": 0}, ConfigError),
        ({"members": 65}, ConfigError),
        ({"config": TrainingConfig(lora_rank=2)}, ConfigError),
    ):
        with pytest.raises(expected, match="members"):
            train_members(model, processor, LAYER_IDX, dialogues, output=tmp_path / "out", **{**options, **changes})
    with pytest.raises(TrainingError, match="already"):
        train_members(model, processor, LAYER_IDX, dialogues, output=output, **options)
    assert not (tmp_path / "out").exists()
    recognizer = EmotionRecognizer.from_pretrained(output, (model, processor))
    with pytest.raises(ConfigError, match="2 members, which are trained one at a time"):
        train_memory(recognizer, dialogues, output=tmp_path / "out")


def test_predict_inspect_and_evaluate_take_the_folder(corpus, trained, tmp_path):
    output, _ = trained
    manifest = corpus / "dev" / "manifest.jsonl"
    answers, *members = (
        json.loads(run("predict", manifest, "--model", HOST_FOLDER, "--adapter", folder, "--json"))["utterances"]
        for folder in (output, output / "members" / "0", output / "members" / "1")
    )
    for mean, one, two in zip(answers, *members, strict=True):
        for label, probability in mean["probabilities"].items():
            both = (one["probabilities"][label] + two["probabilities"][label]) / 2
            assert probability == pytest.approx(both, abs=1e-6)
    found = json.loads(run("inspect", output, "--json"))
    assert (found["memory"]["members"], found["fingerprint"]) == (2, load_adapter(output).fingerprint())
    run("evaluate", manifest, "--model", HOST_FOLDER, "--adapter", output, "--output", tmp_path / "out", "--card")
    evaluation = read_evaluation(tmp_path / "out")
    assert evaluation.run["memory"]["members"] == 2
    assert "with 2 memories after layer" in (tmp_path / "out" / "report.html").read_text()
    by_key = {(a["dialogue_id"], a["utterance_id"]): a["probabilities"] for a in answers}
    for row in evaluation.answers:
        assert {"host_only", "control", "own", "reset", "swapped"} <= row["arms"].keys()
        own = by_key[row["dialogue_id"], row["utterance_id"]]
        assert row["arms"]["own"] == pytest.approx(own, abs=1e-5)
    assert load_adapter(output).metadata.evaluation is not None


def test_the_arms_of_an_evaluation_share_one_pass_below_the_layer(corpus, trained, tmp_path):
    output, _ = trained
    dialogues = make_dialogues(tmp_path / "wav", (2, 3), "dev")
    recognizer = EmotionRecognizer.from_pretrained(output, load_host(str(HOST_FOLDER)))
    calls = [0]

    def count(*_):
        calls[0] += 1

    [tower] = [module for name, module in recognizer.model.named_modules() if name.endswith("audio_tower")]
    tower.register_forward_hook(count)
    control = load_adapter(output / "control")
    arms = ["host_only", "control", "own", "reset"]
    evaluate(recognizer, dialogues, output=tmp_path / "out", control=control, arms=arms, batch_size=1)
    assert calls == [5 + 1]  # each utterance, and the check of the first
    single = load_adapter(output / "control" / "members" / "0")
    with pytest.raises(ConfigError, match="number of members is 1 and the memory's 2"):
        evaluate(recognizer, dialogues, output=tmp_path / "other", control=single, arms=arms)


def test_activations_of_one_memory_serve_several(trained, tmp_path):
    output, _ = trained
    one = make_recognizer()
    dialogues = make_dialogues(tmp_path / "wav", (2,))
    CachedHost(one, one.memory, tmp_path / "cache").keep(dialogues[0].utterances)
    files = sorted(path.name for path in (tmp_path / "cache").iterdir())
    several = EmotionRecognizer.from_pretrained(output, load_host(str(HOST_FOLDER)), prompt=PROMPT, labels=EMOTIONS)
    CachedHost(several, several.memory, tmp_path / "cache").keep(dialogues[0].utterances)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == files


def test_one_member_of_a_folder_is_an_adapter(trained):
    output, _ = trained
    ensemble = MemoryEnsemble.from_pretrained(output)
    assert [m.fingerprint() for m in ensemble.members] == [
        load_adapter(output, subfolder=f"members/{index}").fingerprint() for index in range(2)
    ]
