"""Voices have the requested pitch, level and formants, measured in the audio."""

import numpy as np
import pytest

from mal_adapter.demo.voices import (
    EMOTION_SHIFTS,
    SAMPLING_RATE,
    UTTERANCE_S,
    Speaker,
    Speech,
    draw_speech,
    quantise,
    synthesise,
)

SPEAKER = Speaker(pitch_hz=220.0, loudness_db=-36.0, tract=1.0)


def level_db(audio: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(audio.astype(np.float64) ** 2)))


def pitch_hz(audio: np.ndarray) -> float:
    """The strongest peak of the autocorrelation between 80 and 800 Hz, averaged in log over pieces of 50 ms."""
    lags = np.arange(SAMPLING_RATE // 800, SAMPLING_RATE // 80)
    found = []
    for start in range(1600, len(audio) - 2400, 2400):
        piece = audio[start : start + 800].astype(np.float64)
        correlation = [
            piece[:-lag] @ piece[lag:] / np.sqrt(piece[:-lag] @ piece[:-lag] * (piece[lag:] @ piece[lag:]))
            for lag in lags
        ]
        # the first lag nearly as good as the best: multiples of the period correlate as well as the period
        peaks = [i for i in range(1, len(lags) - 1) if correlation[i - 1] < correlation[i] >= correlation[i + 1]]
        best = max(correlation[i] for i in peaks)
        found.append(SAMPLING_RATE / lags[next(i for i in peaks if correlation[i] > 0.9 * best)])
    return float(np.exp(np.median(np.log(found))))


def say(speech: Speech, seed: int = 0) -> np.ndarray:
    return synthesise(speech, np.random.default_rng(seed))


def test_an_utterance_is_mono_float32_of_fixed_length_and_below_full_scale():
    audio = say(Speech(220.0, -17.0, 1.0, "aeiou"))
    assert audio.dtype == np.float32
    assert audio.shape == (round(UTTERANCE_S * SAMPLING_RATE),)
    assert np.abs(audio).max() < 1.0


@pytest.mark.parametrize("pitch", [110.0, 180.0, 300.0, 520.0])
def test_the_measured_pitch_is_the_requested_one(pitch):
    assert pitch_hz(say(Speech(pitch, -30.0, 1.0, "aeoae"))) == pytest.approx(pitch, rel=0.06)


@pytest.mark.parametrize("level", [-55.0, -36.0, -18.0])
def test_the_measured_level_is_the_requested_one(level):
    assert level_db(say(Speech(220.0, level, 1.0, "aeiou"))) == pytest.approx(level, abs=0.1)


@pytest.mark.parametrize("emotion", ["happy", "angry", "sad"])
def test_an_emotion_shifts_the_audio_from_the_speakers_neutral(emotion):
    rng = np.random.default_rng(3)

    def measured(name: str) -> np.ndarray:
        said = [synthesise(draw_speech(SPEAKER, name, rng), rng) for _ in range(6)]
        return np.mean([(np.log(pitch_hz(audio)), level_db(audio)) for audio in said], axis=0)

    shift = measured(emotion) - measured("neutral")
    assert shift[0] == pytest.approx(EMOTION_SHIFTS[emotion][0], abs=0.12)
    assert shift[1] == pytest.approx(EMOTION_SHIFTS[emotion][1], abs=2.5)


def test_a_smaller_tract_moves_the_spectrum_up():
    def centroid(tract: float) -> float:
        power = np.abs(np.fft.rfft(say(Speech(220.0, -30.0, tract, "aeiou")))) ** 2
        return float(np.average(np.fft.rfftfreq(2 * len(power) - 2, 1 / SAMPLING_RATE), weights=power))

    assert centroid(0.8) < centroid(1.0) < centroid(1.25)


def test_quantising_twice_changes_nothing():
    audio = say(Speech(220.0, -20.0, 1.0, "aeiou"))
    once = quantise(audio)
    assert np.array_equal(quantise(once.astype(np.float32) / 32768.0), once)
    assert np.abs(once / 32768.0 - audio).max() <= 0.5 / 32768.0 + 1e-9
