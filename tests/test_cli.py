"""The command line: real files in, tables or JSON out, one line per bad file, exit codes."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

from mal_adapter import MemoryConfig, attach_memory, cli, demo
from mal_adapter.ser.dialogue import Dialogue, Utterance, write_manifest
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
from tests.ser.conftest import make_dialogue, model, processor, write_audio  # noqa: F401  fixtures

LABELS, PROMPT = ["neutral", "sad", "happy"], "How do they feel?"


@pytest.fixture(scope="module")
def saved(model, processor, tmp_path_factory):  # noqa: F811
    """Folders of a host and of an adapter that makes a difference."""
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder / "host")
    processor.save_pretrained(folder / "host")
    memory = attach_memory(model, layer_idx=0, config=MemoryConfig(hidden_size=32, memory_dim=16, num_heads=2))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    memory.detach()
    memory.adapter.card = dataclasses.replace(
        memory.adapter.card,
        base_model_name_or_path=str(folder / "host"),
        task={"labels": LABELS, "prompt": PROMPT, "aliases": {"hap": "happy"}},
    )
    memory.adapter.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def run(saved, monkeypatch):
    """run(*arguments) -> the result of the command, with the tiny host in the place of the demo's."""
    monkeypatch.setattr(demo, "HOST_FOLDER", saved / "host")
    monkeypatch.setattr(demo, "ADAPTER_FOLDER", saved / "adapter")
    return lambda *arguments: CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_sound_files_in_order_are_one_dialogue(run, saved, write_audio, tmp_path):  # noqa: F811
    files = [
        write_audio("b.wav", 0.7, 22_050),
        write_audio("a.flac", 0.9, 44_100, pitch_hz=170, channels=2),
        write_audio("c.mp3", 1.1, 48_000, pitch_hz=300),
        write_audio("d.ogg", 0.8, 8_000, pitch_hz=140),
    ]
    result = run("predict", *files, "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert (answer["memory"], answer["labels"], answer["prompt"]) == (True, LABELS, PROMPT)
    assert [entry["utterance_id"] for entry in answer["utterances"]] == ["b.wav", "a.flac", "c.mp3", "d.ogg"]
    assert {entry["dialogue_id"] for entry in answer["utterances"]} == {tmp_path.name}

    host, its_processor = load_host(str(saved / "host"))
    with attach_memory(host, adapter=saved / "adapter") as memory:
        dialogue = Dialogue("d", tuple(Utterance("d", path.name, "?", path) for path in files))
        expected = list(EmotionRecognizer(host, its_processor, memory, LABELS, PROMPT).recognize(dialogue))
    assert [entry["probabilities"] for entry in answer["utterances"]] == [
        pytest.approx(result.probabilities, abs=1e-6) for result in expected
    ]
    alone = json.loads(run("predict", *files, "--no-memory", "--json").stdout)
    assert alone["memory"] is False
    assert alone["labels"] == LABELS
    assert alone["utterances"][-1]["probabilities"] != answer["utterances"][-1]["probabilities"]


def test_a_manifest_prints_a_table_per_dialogue_with_the_truth(run, make_dialogue, tmp_path):  # noqa: F811
    dialogues = [make_dialogue("first"), make_dialogue("second", [0.5])]
    labelled = [
        Dialogue(dialogue.dialogue_id, tuple(dataclasses.replace(turn, emotion="sad") for turn in dialogue.utterances))
        for dialogue in dialogues
    ]
    write_manifest(labelled, tmp_path / "calls.jsonl")
    result = run("predict", tmp_path / "calls.jsonl")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "dialogue first"
    assert lines[1].split() == ["utterance", "speaker", "emotion", "truth", "seconds", *LABELS]
    assert [line.split()[:2] for line in lines[2:5]] == [["0", "A"], ["1", "B"], ["2", "A"]]
    assert lines[2].split()[3:5] == ["sad", "0.70"]
    assert lines[5:7] == ["", "dialogue second"]
    assert len({line.index("s") for line in (lines[1], lines[7])}) == 1
    assert result.stderr == ""


def test_bad_files_give_a_line_each_and_good_ones_are_answered(run, write_audio, tmp_path):  # noqa: F811
    good = write_audio("good.wav")
    (tmp_path / "text.wav").write_text("no sound")
    soundfile.write(tmp_path / "silent.wav", np.zeros(9000), 16_000)
    (tmp_path / "bad.jsonl").write_text("{}\n")
    names = ["missing.wav", "text.wav", "silent.wav", "bad.jsonl"]
    for arguments in ([], ["--json"]):
        result = run("predict", tmp_path / "missing.wav", good, *(tmp_path / name for name in names[1:]), *arguments)
        assert result.exit_code == 2
        lines = sorted(result.stderr.splitlines())
        assert len(lines) == 4
        assert [str(tmp_path / name) in line for line, name in zip(lines, sorted(names), strict=True)] == [True] * 4
        assert all(line.startswith("error: ") for line in lines)
        assert "good.wav" in result.stdout
    entries = json.loads(result.stdout)["utterances"]
    assert ["error" in entry for entry in entries] == [True, False, True, True]
    assert run("predict", tmp_path / "bad.jsonl").exit_code == 2
    assert run("predict").exit_code == 2


def test_own_model_labels_and_question(run, saved, write_audio):  # noqa: F811
    path = write_audio("a.wav")
    result = run("predict", path, "--model", saved / "host", "--json")
    assert result.stderr == "note: no --adapter, so each utterance is heard alone\n"
    answer = json.loads(result.stdout)
    assert answer["memory"] is False
    assert answer["labels"] == ["neutral", "happy", "angry", "sad"]
    assert answer["prompt"].endswith("Answer with one word: neutral, happy, angry or sad.")
    answer = json.loads(
        run("predict", path, "--adapter", saved / "adapter", "--labels", "calm, upset", "--json").stdout
    )
    assert answer["memory"] is True
    assert list(answer["utterances"][0]["probabilities"]) == ["calm", "upset"]
    assert answer["prompt"].endswith("calm or upset.")
    assert json.loads(run("predict", path, "--prompt", "Well?", "--json").stdout)["prompt"] == "Well?"


def test_the_same_file_twice(run, write_audio):  # noqa: F811
    path = write_audio("a.wav")
    entries = json.loads(run("predict", path, path, "--json").stdout)["utterances"]
    assert [entry["utterance_id"] for entry in entries] == ["0-a.wav", "1-a.wav"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/where"], "error: the model /no/where can not be loaded: "),
        (["--adapter", "/no/where"], "error: "),
        (["--labels", "one"], "error: a label set needs at least two names"),
    ],
)
def test_our_errors_are_one_line_without_a_traceback(arguments, message, run, write_audio, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(sys, "argv", ["mal-adapter", "predict", str(write_audio("a.wav")), *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    complaint = capsys.readouterr().err
    assert complaint.startswith(message)
    assert complaint.count("\n") == 1


def test_the_version_and_a_light_import(run):
    assert run("--version").stdout[0].isdigit()
    # The package itself may import torch; the command line must add nothing heavy to it.
    code = (
        "import sys, mal_adapter; before = set(sys.modules); import mal_adapter.cli; print(set(sys.modules) - before)"
    )
    added = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "typer" in added
    assert "'mal_adapter.ser'" not in added
    assert "transformers" not in added
