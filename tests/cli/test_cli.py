"""The command line: real files in, tables or JSON out, one line per bad file, exit codes."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr

import numpy as np
import pytest
import soundfile
import torch

from mal_adapter import MemoryConfig, attach_memory, demo
from mal_adapter.cli.failures import guarded
from mal_adapter.ser.dialogue import Dialogue, Utterance, write_manifest
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
from mal_adapter.stores import FolderStore
from tests.commands import interrupted, mal_adapter, on_a_terminal
from tests.stores.states import state_of

LABELS, PROMPT = ["neutral", "sad", "happy"], "How do they feel?"


@pytest.fixture(scope="module")
def saved(model, processor, tmp_path_factory):
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
    memory.adapter.metadata = dataclasses.replace(
        memory.adapter.metadata,
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
    return mal_adapter


def test_sound_files_in_order_are_one_dialogue(run, saved, write_audio, tmp_path):
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


def test_a_manifest_prints_a_table_per_dialogue_with_the_truth(run, make_dialogue, tmp_path):
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


def test_bad_files_give_a_line_each_and_good_ones_are_answered(run, write_audio, tmp_path):
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


def test_your_own_model_labels_and_question(run, saved, write_audio):
    path = write_audio("a.wav")
    result = run("predict", path, "--model", saved / "host", "--json")
    assert result.stderr == "note: no --adapter, so each utterance is recognised on its own\n"
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


def test_the_same_file_twice(run, write_audio):
    path = write_audio("a.wav")
    entries = json.loads(run("predict", path, path, "--json").stdout)["utterances"]
    assert [entry["utterance_id"] for entry in entries] == ["0-a.wav", "1-a.wav"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a file's name is Unicode")
def test_names_that_are_not_utf_8(run, write_audio, tmp_path):
    folder = tmp_path / os.fsdecode(b"m\xfasica")
    folder.mkdir()
    done = run("predict", write_audio("a.wav").rename(folder / os.fsdecode(b"\xe9.wav")))
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("dialogue m\N{REPLACEMENT CHARACTER}sica\n")
    assert "\n\N{REPLACEMENT CHARACTER}.wav " in done.stdout


def test_the_device_and_the_dtype_of_the_weights(run, write_audio):
    path = write_audio("a.wav")
    answers = {
        options: json.loads(run("predict", path, *options, "--json").stdout)
        for options in ((), ("--dtype", "float32"), ("--dtype", "bfloat16", "--device", "cpu"), ("--device", "auto"))
    }
    usual, single, half, spread = answers.values()
    assert [answer["dtype"] for answer in answers.values()] == ["float32", "float32", "bfloat16", "float32"]
    assert {answer["device"] for answer in answers.values()} == {"cpu"}
    probabilities = [list(answer["utterances"][0]["probabilities"].values()) for answer in (single, half, spread)]
    assert probabilities[0] == pytest.approx(list(usual["utterances"][0]["probabilities"].values()), abs=1e-6)
    assert probabilities[1] != probabilities[0]
    assert probabilities[1] == pytest.approx(probabilities[0], abs=0.05)
    assert probabilities[2] == pytest.approx(probabilities[0], abs=1e-6)
    for device, words in (("gpu", "'gpu' is not a device"), ("cuda:99", "there is no cuda:99 here")):
        done = run("predict", path, "--device", device, "--json")
        assert done.exit_code == 2
        assert words in json.loads(done.stdout)["error"]["message"]
    assert run("predict", path, "--dtype", "int8").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "exit_code", "kind", "message"),
    [
        (["--model", "/no/where"], 1, "HostError", "the model /no/where can't be loaded: the folder does not exist"),
        (["--model", "no/where"], 1, "HostError", "the model no/where can't be loaded: "),
        (["--adapter", "/no/where"], 1, "AdapterNotFoundError", ""),
        (["--labels", "one"], 2, "LabelError", "a label set needs at least two names"),
        (["missing.jsonl"], 2, "ManifestError", "missing.jsonl: the manifest can not be read"),
    ],
)
def test_typed_errors_are_one_line_without_a_traceback(arguments, exit_code, kind, message, run, write_audio):
    sounds = [] if kind == "ManifestError" else [write_audio("a.wav")]
    plain, as_json = (run("predict", *sounds, *arguments, *more) for more in ([], ["--json"]))
    assert plain.stderr.startswith(f"error: {message}")
    assert plain.stderr.count("\n") == 1
    assert (plain.exit_code, plain.stdout) == (exit_code, "")
    assert (as_json.exit_code, as_json.stderr) == (exit_code, plain.stderr)
    error = json.loads(as_json.stdout)["error"]
    assert error == {"type": kind, "message": plain.stderr.removeprefix("error: ").rstrip()}


def test_an_unexpected_error_is_one_line_and_debug_shows_the_traceback(run, tmp_path):
    (tmp_path / "sessions").mkdir()
    FolderStore(tmp_path / "sessions").put("a", state_of(1))
    wish = ["states", "export", "a", tmp_path / "absent" / "a.safetensors", "--store", tmp_path / "sessions"]
    done = run(*wish)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith(" (run again with --debug to see where)\n")
    assert done.stderr.count("\n") == 1
    shown = run(*wish, "--debug", "--json")
    assert shown.exit_code == 1
    assert shown.stderr.startswith("Traceback (most recent call last):\n")
    assert "--debug" not in shown.stderr.splitlines()[-1]
    assert json.loads(shown.stdout)["error"]["type"] == "FileNotFoundError"


def test_a_full_device_is_an_error_with_advice():
    with (
        pytest.raises(SystemExit) as stop,
        redirect_stderr(io.StringIO()) as stderr,
        guarded(as_json=False, debug=False),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
    assert stop.value.code == 1
    assert "try --dtype bfloat16" in stderr.getvalue()
    assert stderr.getvalue().count("\n") == 1


def test_wrong_usage_with_json_prints_an_object(run):
    for wish, words in ((["predict"], "FILE"), (["predict", "a.wav", "--modle", "x"], "--modle")):
        done = run(*wish, "--json")
        assert done.exit_code == 2
        assert json.loads(done.stdout)["error"]["type"] == "UsageError"
        assert words in json.loads(done.stdout)["error"]["message"]
        assert "--help" in done.stderr
        assert run(*wish).stdout == ""
    assert run("--", "--json").stdout == ""
    assert run("pedict").exit_code == 2


def test_colours_and_a_bar_appear_only_on_a_terminal(run, make_dialogue, tmp_path, monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    turns = [dataclasses.replace(turn, emotion="sad") for turn in make_dialogue("first", [0.5, 0.6]).utterances]
    write_manifest([Dialogue("first", tuple(turns))], tmp_path / "calls.jsonl")
    wish = ["predict", tmp_path / "calls.jsonl", tmp_path / "missing.wav"]
    piped = run(*wish)
    assert "\x1b" not in piped.stdout + piped.stderr
    shown = on_a_terminal(*wish)
    assert shown.exit_code == piped.exit_code == 2
    assert re.search("\x1b\\[3[12]m(sad|neutral|happy) *\x1b\\[0m", shown.stderr)  # green or red
    assert "\x1b[31m\x1b[1merror:\x1b[0m" in shown.stderr
    assert "recognising: " in shown.stderr
    bare = re.sub("\x1b\\[[0-9]*[mK]", "", shown.stderr)
    assert set(piped.stdout.splitlines()[1:]) <= {line.split("\r")[-1] for line in bare.split("\r\n")}
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in on_a_terminal(*wish).stderr
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[1m" in run(*wish).stdout
    monkeypatch.delenv("FORCE_COLOR")
    split = on_a_terminal(*wish, "--json", stdout_too=False)
    assert len(json.loads(split.stdout)["utterances"]) == 3
    assert "recognising: " in split.stderr


def test_wide_letters_keep_the_columns_aligned(run, write_audio, tmp_path):
    turns = (Utterance("d", "一", "悲伤", write_audio("a.wav")), Utterance("d", "b", "B", write_audio("b.wav")))
    write_manifest([Dialogue("d", turns)], tmp_path / "calls.jsonl")
    lines = run("predict", tmp_path / "calls.jsonl").stdout.splitlines()[2:]
    assert lines[0].startswith("一         悲伤     ")
    assert lines[1].startswith("b          B        ")


def test_control_c_is_quiet_and_130():
    done = interrupted("demo", at=b"loading")
    assert (done.exit_code, done.stdout) == (130, "")
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_pipe_that_is_closed_is_quiet_and_141():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "mal_adapter.cli", "--version"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_warnings_of_libraries_that_transformers_imports_are_not_printed(saved, write_audio):
    command = [sys.executable, "-m", "mal_adapter.cli", "predict", write_audio("a.wav", 0.5, 16_000)]
    done = subprocess.run(
        [*command, "--model", saved / "host", "--adapter", saved / "adapter", "--device", "cpu"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
