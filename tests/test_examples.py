"""The examples run as their first lines say; README's quickstart has its test there."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

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
