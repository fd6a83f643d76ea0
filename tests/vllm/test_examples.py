"""The examples of docs/serving.md run as it says, and give the probabilities of `EmotionRecognizer`."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mal_adapter.demo.dialogues import make_dialogue, write_wavs
from mal_adapter.ser import Dialogue, EmotionRecognizer, Prediction

pytest.importorskip("vllm")

ROOT = Path(__file__).parents[2]
ROUNDED = 1e-4  # the examples print four digits


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a client in this process, with the server's key, and gives what it prints."""

    def run(example: str, *arguments: object) -> str:
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        monkeypatch.setattr(sys, "argv", [example, *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def expected(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Dialogue and utterance -> probabilities, of the dialogues of examples/serve_vllm.py."""
    recognizer = EmotionRecognizer.from_pretrained(pair / "adapter", pair / "host")
    made = [make_dialogue("test", seed=7, index=index, turns=4) for index in range(2)]
    answers = {}
    for call in write_wavs(made, tmp_path_factory.mktemp("wavs")):
        for turn, result in enumerate(recognizer.recognize(call)):
            assert isinstance(result, Prediction)
            answers[f"{call.dialogue_id} {turn}"] = result.probabilities
    return answers


def probabilities(line: str) -> dict[str, float]:
    return {label: float(value) for label, value in re.findall(r"(\w+) ([01]\.\d{4})", line)}


def lines_of_dialogues(printed: str) -> dict[str, dict[str, float]]:
    found = re.findall(r"^(test-\S+ \d+): (.+)$", printed, re.MULTILINE)
    return {name: probabilities(line) for name, line in found}


def test_the_openai_client_prints_what_the_page_shows(run: Callable[..., str], url: str, calls: list[Dialogue]):
    page = (ROOT / "docs" / "serving.md").read_text()
    shown = re.search(r"^\$ python examples/openai_client\.py.*\n((?:\w.*\n)+)", page, re.MULTILINE)
    assert shown is not None
    wanted = [probabilities(line) for line in shown[1].splitlines()]
    files = [utterance.audio for utterance in calls[0].utterances[: len(wanted)]]
    got = [probabilities(line) for line in run("openai_client.py", *files, "--url", f"{url}/v1").splitlines()]
    assert len(got) == len(wanted) == 2
    assert all(a == pytest.approx(b, abs=ROUNDED) for a, b in zip(got, wanted, strict=True))


def test_dialogues_at_a_server(run: Callable[..., str], url: str, pair: Path, expected: dict[str, dict[str, float]]):
    got = lines_of_dialogues(run("serve_vllm.py", "online", url, pair / "adapter"))
    assert got == {name: pytest.approx(wanted, abs=ROUNDED) for name, wanted in expected.items()}


def test_dialogues_in_an_engine_of_the_examples_own(pair: Path, expected: dict[str, dict[str, float]], tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_CACHE_ROOT": str(tmp_path)}
    command = [sys.executable, "examples/serve_vllm.py", "offline", pair / "host", pair / "adapter"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    got = lines_of_dialogues(done.stdout)
    assert got == {name: pytest.approx(wanted, abs=ROUNDED) for name, wanted in expected.items()}
