"""The commands and snippets of docs/train_your_own.md run as written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[3] / "docs" / "train_your_own.md"


@pytest.mark.slow
def test_the_guide_runs_as_written(tmp_path):
    page = GUIDE.read_text()
    # a third of the time
    for long, short in (('"epochs": 8', '"epochs": 4'), ("'test', seed=1, count=20", "'test', seed=1, count=5")):
        assert page.count(long) == 1
        page = page.replace(long, short)
    blocks = re.findall(r"```(python|sh)\n(.*?)```", page, re.DOTALL)
    script = ["set -e", 'python() { "$PYTHON" "$@"; }', 'mal-adapter() { "$PYTHON" -m mal_adapter.cli "$@"; }']
    for n, (language, text) in enumerate(blocks):
        if language == "python":
            (tmp_path / f"block{n}.py").write_text(text)
            text = f"python block{n}.py"
        script.append(text)
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(GUIDE.parents[1])
    command = ["bash", "-c", "\n".join(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = re.findall(r"dev weighted F1 (\d\.\d+)", done.stdout)
    assert len(figures) >= 2
    # The first figure is that of the bare host.
    assert max(map(float, figures[1:])) > float(figures[0])
    assert len(re.findall(r"^[AB] \w+$", done.stdout, re.MULTILINE)) == 10
    assert re.search(r"^own +WA 0\.\d{3}", done.stdout, re.MULTILINE)
    assert (tmp_path / "my-evaluation" / "report.html").exists()
    print(done.stdout[-1500:])
