"""The examples run as their first lines say; README's quickstart has its test there."""

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from mal_adapter.demo import HOST_FOLDER
from tests.ser.made_corpora import make_iemocap, make_meld
from tests.ser.training_world import make_dialogues

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = ("--model", HOST_FOLDER, "--layer", 1, "--epochs", 1)
INCOMPLETE = "ignore::mal_adapter.errors.IncompleteCorpusWarning"  # these corpora are a few dialogues


def answers(printed: str) -> list[str]:
    return re.findall(r"^[AB]: \w+ +[01]\.\d{4}$", printed, re.MULTILINE)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs an example in this process, which has paid for the imports already, and gives what it prints; what processes
    print that it starts as well."""

    def run(example: str, *arguments: object) -> str:
        AcceleratorState._reset_state()
        monkeypatch.setattr(sys, "argv", [example, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / example), run_name="__main__")
        return capfd.readouterr().out

    return run


def test_a_call_resumed_by_another_process_is_answered_as_by_one(run, tmp_path: Path, capfd):
    printed = run("resume_a_call.py", tmp_path / "sessions")
    assert re.findall(r"has (\d+) utterances in memory", printed) == ["5", "10"]
    runpy.run_path(str(EXAMPLES / "resume_a_call.py"))["answer"](str(tmp_path / "alone"), 0, 10)
    assert answers(printed) == answers(capfd.readouterr().out)
    assert len(answers(printed)) == 10


def test_a_recording_is_answered_turn_by_turn_and_gets_a_page(run):
    *turns, page = run("timeline.py").splitlines()
    assert len(turns) == 30
    assert {line.split()[1] for line in turns} == {"customer", "agent"}
    changed = sum(" not " in line for line in turns)
    assert changed > 0
    assert f"changed <b>{changed}</b> of 30 answers" in Path(page).read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings(INCOMPLETE)
def test_a_memory_is_trained_on_a_folder_in_the_layout_of_meld(run, tmp_path: Path):
    root = make_meld(tmp_path / "MELD.Raw", {"train": (3, 2, 2), "dev": (2, 2), "test": (3, 2)})
    printed = run("train_meld.py", root, tmp_path / "out", *TINY)
    assert re.search(r"^own +weighted F1 \d\.\d{3}", printed, re.MULTILINE)
    assert re.search(r"^control +weighted F1 \d\.\d{3}", printed, re.MULTILINE)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "out" / "report" / "report.html").stat().st_size > 20_000


@pytest.mark.slow
@pytest.mark.filterwarnings(INCOMPLETE)
def test_one_memory_per_session_of_iemocap_that_is_left_out(run, tmp_path: Path):
    root = make_iemocap(tmp_path / "IEMOCAP", 3, (3, 2))
    printed = run("train_iemocap.py", root, tmp_path / "out", *TINY)
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert report["arms"]["own"]["utterances"] == 15
    assert len(report["run"]["fingerprint"]) == len(report["run"]["control"]) == 3
    assert set(report["clusters"]) == {"dialogues", "speakers"}  # six of them
    assert run("train_iemocap.py", root, tmp_path / "out", *TINY).splitlines()[-8:] == printed.splitlines()[-8:]


@pytest.mark.slow
def test_a_lora_with_and_without_a_memory(run, tmp_path: Path):
    splits = {"train": (3, 2, 2), "dev": (2, 2), "test": (3, 2)}
    for split, lengths in splits.items():
        make_dialogues(tmp_path / split, lengths, split)
    manifests = [tmp_path / split / "manifest.jsonl" for split in splits]
    printed = run("lora_and_memory.py", *manifests, tmp_path / "out", *TINY)
    assert re.search(r"^difference [+-]\d\.\d{3}, p = ", printed, re.MULTILINE)
    assert (tmp_path / "out" / "lora-and-memory" / "lora" / "adapter_config.json").exists()
