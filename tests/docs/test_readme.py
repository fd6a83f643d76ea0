"""What README.md shows runs, and its set-up commands are where `.ci/run` looks for them."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import soundfile

from mal_adapter import MemoryState
from mal_adapter.demo import ADAPTER_FOLDER, EMOTIONS, HOST_FOLDER
from mal_adapter.demo.dialogues import make_dialogue
from tests.docs.pages import ROOT, blocks

README = (ROOT / "README.md").read_text()


def run(script: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that a script prints, run in this process, which has paid for the imports already."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_the_code_for_a_7b_checkpoint_runs_on_the_tiny_host(tmp_path, monkeypatch, capsys):
    (block,) = blocks(ROOT / "README.md", "python")
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
    """In a process of its own in tests/test_packaging.py."""
    assert len(run(ROOT / "examples" / "quickstart.py", tmp_path, monkeypatch, capsys)) == 10
