"""The examples run as their first lines say; README's quickstart has its test there."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from mal_adapter.demo import HOST_FOLDER
from tests.ser.made_corpora import make_iemocap, make_meld
from tests.ser.training_world import make_dialogues

EXAMPLES = Path(__file__).parents[1] / "examples"


def answers(printed: str) -> list[str]:
    return re.findall(r"^[AB]: \w+ +[01]\.\d{4}$", printed, re.MULTILINE)


def test_a_call_resumed_by_another_process_is_answered_as_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    example = EXAMPLES / "resume_a_call.py"
    command = [sys.executable, example, tmp_path / "sessions"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"has heard (\d+) utterances", done.stdout) == ["5", "10"]
    runpy.run_path(str(example))["answer"](str(tmp_path / "alone"), 0, 10)
    assert answers(done.stdout) == answers(capsys.readouterr().out)
    assert len(answers(done.stdout)) == 10


def run(example: str, *arguments: object) -> str:
    command = [sys.executable, EXAMPLES / example, *map(str, arguments), "--model", str(HOST_FOLDER), "--layer", "1"]
    done = subprocess.run([*command, "--epochs", "1"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_memory_is_trained_on_a_folder_in_the_layout_of_meld(tmp_path: Path):
    root = make_meld(tmp_path / "MELD.Raw", {"train": (3, 2, 2), "dev": (2, 2), "test": (3, 2)})
    printed = run("train_meld.py", root, tmp_path / "out")
    assert re.search(r"^right +weighted F1 \d\.\d{3}", printed, re.MULTILINE)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "out" / "report" / "report.html").stat().st_size > 20_000


@pytest.mark.slow
def test_one_memory_per_session_of_iemocap_that_is_left_out(tmp_path: Path):
    root = make_iemocap(tmp_path / "IEMOCAP", 3, (3, 2))
    printed = run("train_iemocap.py", root, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert report["arms"]["right"]["utterances"] == 15
    assert len(report["run"]["fingerprint"]) == 3
    assert run("train_iemocap.py", root, tmp_path / "out").splitlines()[-7:] == printed.splitlines()[-7:]


@pytest.mark.slow
def test_a_lora_with_and_without_a_memory(tmp_path: Path):
    splits = {"train": (3, 2, 2), "dev": (2, 2), "test": (3, 2)}
    for split, lengths in splits.items():
        make_dialogues(tmp_path / split, lengths, split)
    printed = run("lora_and_memory.py", *(tmp_path / split / "manifest.jsonl" for split in splits), tmp_path / "out")
    assert re.search(r"^difference [+-]\d\.\d{3}, p = ", printed, re.MULTILINE)
    assert (tmp_path / "out" / "lora-and-memory" / "lora" / "adapter_config.json").exists()
