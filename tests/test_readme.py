"""What README.md shows runs as it is pasted, and its set-up commands are where `.ci/run` looks for them."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_each_code_block_runs_as_pasted(tmp_path):
    command = [sys.executable, ROOT / "tests" / "docs" / "pages.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("->") == 10  # the first block's dialogue
    assert done.stdout.splitlines()[-1].startswith("1 ['neutral'")  # the second's card


def test_the_set_up_is_two_commands():
    section = re.search(r"<!-- setup -->(.*?)<!-- /setup -->", README, re.DOTALL)
    assert section is not None
    commands = [line for line in section[1].splitlines() if re.match(r"(pip|python)", line)]
    assert [command.split(" && ")[-1].split()[0] for command in commands] == ["mal-adapter", "pytest"]


def test_the_quickstart_example_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "quickstart.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 10
