"""Training and evaluation from whole recordings, without cutting files: as from a file per utterance."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
import soundfile
import torch
from accelerate.state import AcceleratorState

from mal_adapter.errors import IncompleteCorpusWarning
from mal_adapter.ser import evaluate, read_corpus
from mal_adapter.ser.corpora.manifests import read_manifests
from mal_adapter.ser.dialogue import Dialogue, read_manifest, write_manifest
from mal_adapter.ser.recognizer.sound import reader
from mal_adapter.ser.training.cached_host import CachedHost
from tests.ser.training_world import make_dialogues, make_recognizer, parameters_of, run


def join(dialogue, folder):
    """The dialogue as one stereo recording: its speakers take turns on two channels, each with noise of its own."""
    speakers = sorted({utterance.speaker for utterance in dialogue.utterances})
    rng = np.random.default_rng(len(dialogue.utterances))
    pieces, turns, position = [], [], 0
    for utterance in dialogue.utterances:
        samples, rate = soundfile.read(utterance.audio, dtype="int16")
        channel = speakers.index(utterance.speaker) % 2
        piece = rng.integers(-3_000, 3_000, (len(samples) + 1_600, 2), dtype=np.int16)
        piece[: len(samples), channel] = samples
        pieces.append(piece)
        start_s, end_s = position / rate, (position + len(samples)) / rate
        path = folder / f"{dialogue.dialogue_id}.wav"
        turns.append(dataclasses.replace(utterance, audio=path, start_s=start_s, end_s=end_s, channel=channel))
        position += len(piece)
    soundfile.write(path, np.concatenate(pieces), rate)
    return Dialogue(dialogue.dialogue_id, tuple(turns))


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    return make_dialogues(folder / "train"), make_dialogues(folder / "dev", (3, 2), "dev")


@pytest.fixture(scope="module")
def whole(cut, tmp_path_factory):
    """The same dialogues as recordings, read back from manifests."""
    folder = tmp_path_factory.mktemp("whole")
    for split, dialogues in zip(("train", "dev"), cut, strict=True):
        (folder / split).mkdir()
        write_manifest([join(dialogue, folder / split) for dialogue in dialogues], folder / f"{split}.jsonl")
    return folder


@pytest.fixture(autouse=True)
def _any_precision():
    AcceleratorState._reset_state()


def test_a_manifest_of_recordings_is_a_corpus(whole, cut):
    first = json.loads((whole / "train.jsonl").read_text().splitlines()[0])
    assert first["audio"] == f"train/{cut[0][0].dialogue_id}.wav"
    assert {"start_s", "end_s", "channel"} <= first.keys()
    corpus = read_corpus(whole)
    assert corpus.splits["train"] == tuple(read_manifest(whole / "train.jsonl"))
    assert {utterance.channel for dialogue in corpus.splits["train"] for utterance in dialogue.utterances} == {0, 1}
    assert len(list((whole / "train").iterdir())) == len(cut[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", IncompleteCorpusWarning)
        read_manifests(whole)


@pytest.mark.parametrize("cached", [False, True])
def test_training_and_evaluation_from_recordings_are_those_from_cut_files(whole, cut, tmp_path, cached):
    recordings = (read_manifest(whole / "train.jsonl"), read_manifest(whole / "dev.jsonl"))
    found = {}
    for name, (train, dev) in {"cut": cut, "whole": recordings}.items():
        options = {"cache_activations": True} if cached else {}
        recognizer, report = run(tmp_path / name, train, dev, **options)
        evaluation = evaluate(recognizer, dev, output=tmp_path / f"{name}-evaluation")
        found[name] = (parameters_of(recognizer), report, evaluation)
    for parameter, value in found["cut"][0].items():
        assert torch.equal(value, found["whole"][0][parameter])
    assert found["cut"][1]["epochs"] == found["whole"][1]["epochs"]
    assert found["cut"][2].answers == found["whole"][2].answers
    assert len(found["cut"][2].answers) == 5


def test_activations_of_two_channels_are_kept_apart(whole, tmp_path):
    (dialogue, *_) = read_manifest(whole / "train.jsonl")
    first = dialogue.utterances[0]
    channels = [dataclasses.replace(first, channel=channel) for channel in (0, 1, None)]
    recognizer = make_recognizer(random=True)
    host = CachedHost(recognizer, recognizer.memory, tmp_path)
    assert host.keep(channels) == []
    assert len(list(tmp_path.iterdir())) == 3
    with recognizer.memory.disabled():
        kept = host.log_probs(host.prepare(channels).inputs)
        plain = recognizer.log_probs(recognizer.prepare(channels).inputs)
    torch.testing.assert_close(kept, plain, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(kept[0], kept[1], atol=1e-3)


def test_a_recording_is_read_where_its_utterances_are(whole, monkeypatch):
    (dialogue, *_) = read_manifest(whole / "train.jsonl")
    decoded = []
    read = reader.Sound._read
    monkeypatch.setattr(reader.Sound, "_read", lambda self, frames: decoded.append(frames) or read(self, frames))
    last = dialogue.utterances[-1]
    make_recognizer().prepare([last])
    duration_s = soundfile.info(last.audio).duration
    assert sum(decoded) <= (last.end_s - last.start_s) * 16_000 + 1_100 < 0.5 * duration_s * 16_000
