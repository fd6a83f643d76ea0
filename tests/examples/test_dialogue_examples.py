"""The examples that hear a dialogue run as their first lines say."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mal_adapter.demo.dialogues import make_dialogue, write_wavs

EXAMPLES = Path(__file__).parents[2] / "examples"
ANSWER = re.compile(r"^(\S+) +(\w+ +[01]\.\d\d) (\w+ +[01]\.\d\d) (\w*)$", re.MULTILINE)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs an example in this process, which has paid for the imports already, and gives what it prints."""

    def run(example: str, *arguments: object) -> str:
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr(sys, "argv", [example, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / example), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_qwen2_audio_answers_with_a_memory_beside_without(run):
    printed = run("qwen2_audio_dialogue.py", "--tiny")
    answers = ANSWER.findall(printed)
    assert len(answers) == 10
    right = [sum(row[column].startswith(row[3]) for row in answers) for column in (1, 2)]
    assert right[0] > right[1]
    assert "10 utterances, 180 audio tokens in memory" in printed


def test_sound_files_on_the_command_line_are_one_dialogue(run, tmp_path: Path):
    (dialogue,) = write_wavs([make_dialogue("test", 7, 0, turns=3)], tmp_path)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    files = [utterance.audio for utterance in dialogue.utterances]
    printed = run("qwen2_audio_dialogue.py", "--tiny", files[0], tmp_path / "broken.wav", *files[1:])
    assert [answer[0] for answer in ANSWER.findall(printed)] == [
        f"{n}-{files[i].name}" for n, i in ((1, 0), (3, 1), (4, 2))
    ]
    assert "broken.wav: this can not be read as audio" in printed
    assert "call: 3 utterances, 54 audio tokens in memory" in printed


def test_voxtral_is_loaded_with_its_own_processor_and_fills_a_memory(run):
    printed = run("voxtral_dialogue.py", "--tiny")
    answers = ANSWER.findall(printed)
    assert len(answers) == 10
    assert [answer[1] for answer in answers] == [answer[2] for answer in answers]  # until it is trained
    assert len({answer[1] for answer in answers}) > 1
    assert "10 utterances, 3750 audio tokens in memory" in printed


def test_calls_side_by_side_are_answered_as_one_by_one(run):
    printed = run("many_calls.py", "--calls", "5")
    assert re.findall(r"^ ?(\d+) at a time: +\d", printed, re.MULTILINE) == ["5", "1", "5"]
    assert float(printed.split("probability: ")[1]) < 1e-5
