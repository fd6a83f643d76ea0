"""`mal-adapter train` makes a folder that `mal-adapter predict` can load, on one and on two processes."""

import json
import os
import re
import subprocess
import sys

import pytest
from accelerate.state import AcceleratorState
from typer.testing import CliRunner

from mal_adapter.cli import app
from mal_adapter.demo import HOST_FOLDER
from mal_adapter.errors import ConfigError, HostError, LabelError, ManifestError, TrainingError
from tests.commands import interrupted
from tests.ser.training_world import make_dialogues

SETTINGS = {"epochs": 9, "batch_size": 3, "memory": {"memory_dim": 16, "num_heads": 2, "dropout": 0.1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    make_dialogues(folder / "train")
    make_dialogues(folder / "dev", (3, 2), "dev")
    (folder / "settings.json").write_text(json.dumps(SETTINGS))
    return folder


def arguments(folder, output, *more):
    return [
        "train", str(folder / "train" / "manifest.jsonl"), "--dev", str(folder / "dev" / "manifest.jsonl"),
        "--model", str(HOST_FOLDER), "--layer", "1", "--output", str(output), "--config", str(folder / "settings.json"),
        "--epochs", "1", *more,
    ]  # fmt: skip


def invoke(command):
    AcceleratorState._reset_state()
    return CliRunner().invoke(app, command)


def test_predict_loads_a_trained_folder(folder, tmp_path):
    done = invoke(arguments(folder, tmp_path / "adapter", "--prompt", "How does the speaker feel?"))
    assert done.exit_code == 0, done.output
    assert "epoch 1: loss" in done.stdout
    assert "bare host: dev loss" in done.stdout
    report = json.loads((tmp_path / "adapter" / "training.json").read_text())
    assert (report["config"]["epochs"], report["config"]["batch_size"]) == (1, 3)
    assert report["memory"]["memory_dim"] == 16
    assert report["labels"] == ["angry", "happy", "neutral"]  # what these dialogues have
    assert report["dtype"] == "float32"
    wavs = sorted(str(path) for path in (folder / "dev").glob("*.wav"))[:2]
    found = CliRunner().invoke(
        app, ["predict", *wavs, "--model", str(HOST_FOLDER), "--adapter", str(tmp_path / "adapter"), "--json"]
    )
    assert found.exit_code == 0, found.output
    answer = json.loads(found.stdout)
    assert (answer["labels"], answer["prompt"]) == (report["labels"], "How does the speaker feel?")
    again = invoke(arguments(folder, tmp_path / "adapter"))
    assert isinstance(again.exception, TrainingError)
    assert (
        invoke(arguments(folder, tmp_path / "adapter", "--prompt", "How does the speaker feel?", "--resume")).exit_code
        == 0
    )


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"--model": "/nowhere"}, HostError),
        ({"--layer": "77"}, ConfigError),
        ({"--dev": "/nowhere.jsonl"}, ManifestError),
        ({"--labels": "good"}, LabelError),
        ({"--epochs": "0"}, ConfigError),
        ({"--config": "/nowhere.json"}, ConfigError),
    ],
)
def test_a_wrong_option_raises_its_type_of_error(folder, tmp_path, change, error):
    done = invoke(arguments(folder, tmp_path, *(part for pair in change.items() for part in pair)))
    assert isinstance(done.exception, error)


def test_a_training_stopped_by_control_c_names_resume_and_can_be_resumed(folder, tmp_path):
    command = arguments(folder, tmp_path / "adapter")
    done = interrupted(*command, at=b"epoch 1/1:")
    assert done.exit_code == 130
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert invoke([*command, "--resume"]).exit_code == 0


def test_emotions_outside_of_the_labels_are_reported(folder, tmp_path):
    half = ["--dtype", "bfloat16", "--device", "cpu", "--json"]
    done = invoke(arguments(folder, tmp_path / "adapter", "--labels", "neutral, angry", *half))
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "adapter" / "training.json").read_text())
    assert json.loads(done.stdout) == {"output": str(tmp_path / "adapter"), **report}
    assert report["dtype"] == "bfloat16"
    assert re.search(r"note: \d+ utterances are 'happy', which is not a label", done.stderr)
    assert json.loads((tmp_path / "adapter" / "training.json").read_text())["train"]["not_judged"].keys() == {"happy"}


@pytest.mark.slow
def test_accelerate_launch_runs_the_command_on_two_processes(folder, tmp_path):
    # accelerate's own launcher of several processes is called --multi_gpu; this variable has each of them use the CPU.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launch, "-m", "mal_adapter.cli", *arguments(folder, tmp_path / "adapter")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("saved in") == 1
    assert json.loads((tmp_path / "adapter" / "training.json").read_text())["processes"] == 2
