"""Dialogues depend on their seeds alone, splits share nothing, and WAV files have exactly the samples of training."""

import numpy as np
import soundfile

from mal_adapter.demo import EMOTIONS
from mal_adapter.demo.dialogues import MIN_TRACT_RATIO, SPLITS, TURNS, make_dialogue, make_dialogues, write_wavs
from mal_adapter.ser.dialogue import read_manifest


def test_a_dialogue_depends_on_split_seed_and_index_only():
    again = [make_dialogue("test", 5, 2), list(make_dialogues("test", 5, 3))[2]]
    for one, other in zip(again[0].turns, again[1].turns, strict=True):
        assert np.array_equal(one.pcm, other.pcm)
        assert (one.speaker, one.emotion, one.speech) == (other.speaker, other.emotion, other.speech)
    assert again[0].speakers == again[1].speakers


def test_splits_seeds_and_indices_share_no_utterance():
    keys = [(split, seed, index) for split in SPLITS for seed in (0, 1) for index in (0, 1)]
    sounds = [turn.pcm.tobytes() for key in keys for turn in make_dialogue(*key, turns=3).turns]
    assert len(set(sounds)) == len(sounds)


def test_both_speakers_speak_and_have_their_own_voice():
    for dialogue in make_dialogues("dev", 0, 10):
        assert len(dialogue.turns) == TURNS
        assert {turn.speaker for turn in dialogue.turns} == {0, 1}
        small, large = sorted(speaker.tract for speaker in dialogue.speakers)
        assert large / small >= MIN_TRACT_RATIO - 1e-9
        assert all(turn.speech.tract == dialogue.speakers[turn.speaker].tract for turn in dialogue.turns)


def test_first_utterances_are_mostly_neutral_and_no_emotion_is_rare():
    first, everything = [], []
    for dialogue in make_dialogues("dev", 1, 40, turns=6):
        for speaker in (0, 1):
            first.append(next(turn.emotion for turn in dialogue.turns if turn.speaker == speaker))
        everything += [turn.emotion for turn in dialogue.turns]
    assert 0.64 < first.count("neutral") / len(first) < 0.94
    assert min(everything.count(emotion) for emotion in EMOTIONS) > 0.10 * len(everything)


def test_wav_files_read_back_bit_for_bit(tmp_path):
    dialogues = [make_dialogue("test", 0, index, turns=4) for index in range(2)]
    written = write_wavs(dialogues, tmp_path)
    assert read_manifest(tmp_path / "manifest.jsonl") == written
    for dialogue, record in zip(dialogues, written, strict=True):
        for turn, utterance in zip(dialogue.turns, record.utterances, strict=True):
            audio, sampling_rate = soundfile.read(utterance.audio, dtype="float32")
            assert sampling_rate == 16_000
            assert soundfile.info(utterance.audio).subtype == "PCM_16"
            assert np.array_equal(audio, turn.audio)
            assert (utterance.emotion, utterance.speaker) == (turn.emotion, "AB"[turn.speaker])
