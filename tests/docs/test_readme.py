"""The code of README.md runs, and its set-up commands are where `.ci/run` looks for them."""

import ast
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import soundfile

from mal_adapter import MemoryAdapter, MemoryState
from mal_adapter.demo import ADAPTER_FOLDER, EMOTIONS, HOST_FOLDER, LAYER_IDX
from mal_adapter.demo.dialogues import make_dialogue
from tests.docs.pages import DOCS, ROOT, blocks

README = (ROOT / "README.md").read_text()


def run(script: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run a script in this process, where the imports are already done, and return the lines that it prints."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def whole_life() -> str:
    """The first program of the README."""
    return next(block.code for block in blocks(ROOT / "README.md", "python") if not block.needs_weights)


def test_the_whole_life_of_a_memory_runs_as_pasted(tmp_path, monkeypatch, capsys):
    (tmp_path / "life.py").write_text(whole_life())
    *predicted, verdict = run(tmp_path / "life.py", tmp_path, monkeypatch, capsys)
    assert len(predicted) == 10
    answers = [line.split()[1:] for line in predicted]
    assert all({spoken, label} <= {*EMOTIONS} for spoken, _, label in answers), answers
    assert sum(spoken == label for spoken, _, label in answers) >= 8
    figures = json.loads((tmp_path / "my-report" / "report.json").read_text())
    assert figures["verdict"] == verdict
    assert figures["arms"]["own"]["wa"] > figures["arms"]["host_only"]["wa"] + 0.15
    assert (tmp_path / "my-report" / "report.html").is_file()
    assert MemoryAdapter.from_pretrained(tmp_path / "my-memory").metadata.layer_idx == LAYER_IDX


def test_the_whole_life_is_on_one_screen_and_imports_two_packages():
    code = whole_life()
    modules = {node.module for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)}
    assert len(code.splitlines()) <= 30
    assert modules == {"mal_adapter", "mal_adapter.ser"}
    steps = ["from_pretrained(", ".recognize(", "train_memory(", "evaluate(", "write_report(", ".push_to_hub("]
    places = [code.index(step, code.index("\n\n")) for step in steps]
    assert places == sorted(places)


def test_the_site_begins_with_the_same_program():
    assert blocks(DOCS / "index.md", "python")[0].code == whole_life()


def test_the_code_for_a_7b_checkpoint_runs_on_the_tiny_host(tmp_path, monkeypatch, capsys):
    (block,) = (block for block in blocks(ROOT / "README.md", "python") if block.needs_weights)
    code = block.code
    for name, folder in (("Qwen/Qwen2-Audio-7B-Instruct", HOST_FOLDER), ("user/mal-qwen2-audio", ADAPTER_FOLDER)):
        assert code.count(f'"{name}"') == 1
        code = code.replace(f'"{name}"', repr(str(folder)))
    turns = make_dialogue("test", seed=7, index=0).turns[:3]
    for number, turn in enumerate(turns, start=1):
        soundfile.write(tmp_path / f"turn{number}.wav", turn.audio, 16_000)
    (tmp_path / "readme.py").write_text(code)
    answers = [line.split(" -> ") for line in run(tmp_path / "readme.py", tmp_path, monkeypatch, capsys)]
    assert [file for file, _ in answers] == ["turn1.wav", "turn2.wav", "turn3.wav"]
    assert all(answer.startswith(EMOTIONS) for _, answer in answers), answers
    assert MemoryState.load(tmp_path / "call-42.safetensors").utterances.item() == 3


def test_the_set_up_is_two_commands():
    section = re.search(r"<!-- setup -->(.*?)<!-- /setup -->", README, re.DOTALL)
    assert section is not None
    commands = [line for line in section[1].splitlines() if re.match(r"(pip|python)", line)]
    assert [command.split(" && ")[-1].split()[0] for command in commands] == ["mal-adapter", "pytest"]


def test_the_quickstart_example_runs(tmp_path, monkeypatch, capsys):
    """tests/test_packaging.py runs it in its own process."""
    assert len(run(ROOT / "examples" / "quickstart.py", tmp_path, monkeypatch, capsys)) == 10
