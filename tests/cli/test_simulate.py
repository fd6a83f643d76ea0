"""`mal-adapter simulate` on sound files with published names."""

import json
from pathlib import Path

from mal_adapter.ser.dialogue import read_manifest
from tests.commands import mal_adapter
from tests.ser.made_clips import make_ravdess, make_sound

LABELS = "neutral,calm=neutral,happy,angry,sad"


def test_a_named_corpus_becomes_manifests(tmp_path: Path):
    root = make_ravdess(tmp_path / "RAVDESS")
    common = ("--labels", LABELS, "--preset", "mood", "--dialogues", 40, "--eval-dialogues", 10)
    done = mal_adapter("simulate", "ravdess", "--root", root, *common, "--output", tmp_path / "made")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[1].split()[:1] == ["train"]
    assert "have no label are left out: 192 fear" in done.stderr
    dialogues = read_manifest(tmp_path / "made" / "train.jsonl")
    assert len(dialogues) == 40
    assert {turn.emotion for one in dialogues for turn in one.utterances} == {"neutral", "happy", "angry", "sad"}

    again = mal_adapter("simulate", f"ravdess={root}", *common, "--output", tmp_path / "again", "--json")
    assert json.loads(again.stdout)["config"]["speaker_persistence"] == 0.65
    for path in (tmp_path / "made").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_folders_by_patterns(tmp_path: Path):
    for corpus, form in (("one", "{}/{}_{}.wav"), ("two", "{1}-{0}-{2}.wav")):
        for speaker in range(12):
            for emotion in ("neutral", "sad"):
                for text in range(5):
                    make_sound(tmp_path / corpus / form.format(speaker, emotion, text))
    common = ("--dialogues", 10, "--eval-dialogues", 0, "--output", tmp_path / "made")
    patterns = ("--pattern", "one={speaker}/{emotion}_{text}.wav", "--pattern", "two={emotion}-{speaker}-{text}.wav")
    folders = [f"{name}={tmp_path / name}" for name in ("one", "two")]
    done = mal_adapter("simulate", *folders, *patterns, *common)
    assert done.exit_code == 0, done.stderr
    speakers = {turn.speaker[:3] for one in read_manifest(tmp_path / "made/train.jsonl") for turn in one.utterances}
    assert speakers == {"one", "two"}
    done = mal_adapter("simulate", tmp_path / "one", *patterns[:1], "{speaker}/{emotion}_{text}.wav", *common)
    assert done.exit_code == 0, done.stderr


def test_wrong_usage_says_what_to_do(tmp_path: Path):
    output = ("--output", tmp_path / "made")
    for words, message in (
        (("ravdess",), "--root FOLDER, or ravdess=FOLDER"),
        ((tmp_path,), "needs a --pattern"),
        (("ravdess=a", "tess=b", "--root", tmp_path), "of several, give NAME=FOLDER"),
        (("ravdess", "--root", tmp_path), "looked for sound files such as 03-01-06-01-02-01-12.wav"),
        ((tmp_path, "--pattern", "x={speaker}_{emotion}.wav"), "needs a --pattern"),
        (("ravdess", "--root", tmp_path, "--folds", 3), "go together"),
        (("ravdess", "--root", tmp_path, "--labels", "a"), "at least two"),
    ):
        done = mal_adapter("simulate", *words, *output)
        assert done.exit_code == 2, done.stdout
        assert message in done.stderr
    assert not (tmp_path / "made").exists()
