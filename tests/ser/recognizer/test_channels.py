"""One channel of a recording is read as if it were a file of its own."""

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_adapter.errors import AudioError
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.recognizer.audio import load_waveform
from tests.ser.odd_sounds import speech

RATE = 22_050


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Three channels with different sound, and each of them as a file."""
    folder = tmp_path_factory.mktemp("channels")
    samples = np.concatenate([speech(4.0, RATE, 1) * gain for gain in (1.0, -0.5, 0.2)], axis=1)
    samples[:, 1] = np.roll(samples[:, 1], 5_000)
    samples[:, 2] = samples[::-1, 2]
    soundfile.write(folder / "all.flac", samples, RATE)
    for channel in range(3):
        soundfile.write(folder / f"{channel}.flac", samples[:, channel], RATE)
    return folder


def load(path, channel=None, start_s=None, end_s=None, sampling_rate=16_000):
    return load_waveform(Utterance("d", "0", "A", path, start_s, end_s, channel=channel), sampling_rate)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_channel_equals_its_own_file(recording, data):
    channel = data.draw(st.integers(0, 2))
    start_s = data.draw(st.none() | st.floats(0, 3.9))
    end_s = data.draw(st.none() | st.floats((start_s or 0) + 0.05, 4.0))
    rate = data.draw(st.sampled_from([8_000, 16_000, RATE, 44_100]))
    alone = load(recording / f"{channel}.flac", None, start_s, end_s, rate)
    assert np.array_equal(load(recording / "all.flac", channel, start_s, end_s, rate), alone)


def test_without_a_channel_all_are_averaged(recording):
    mean = np.mean([load(recording / f"{channel}.flac") for channel in range(3)], axis=0)
    np.testing.assert_allclose(load(recording / "all.flac"), mean, atol=1e-4)


@pytest.mark.parametrize(("name", "have"), [("all", "3 channels"), ("1", "1 channel")])
def test_a_channel_that_the_file_lacks(recording, name, have):
    with pytest.raises(AudioError, match=rf"{name}\.flac: the utterance is in channel 3, .* has {have}; "):
        load(recording / f"{name}.flac", 3)
    with pytest.raises(AudioError, match=have):
        load(recording / f"{name}.flac", 3, 0.5, 1.0)


def test_levels_are_those_of_the_channel(tmp_path):
    loud = speech(2.0, RATE, 1)
    path = tmp_path / "call.wav"
    soundfile.write(path, np.concatenate((loud, np.zeros_like(loud), -loud), axis=1), RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match="silent"):
        load(path, 1)
    np.testing.assert_array_equal(load(path, 0), -load(path, 2))
    soundfile.write(path, np.concatenate((loud, -loud), axis=1), RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match="cancel each other"):
        load(path)
    assert load(path, 0).size == load(path, 1).size == 32_000
    samples = np.concatenate((loud, loud), axis=1)
    samples[100, 1] = np.inf
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    assert load(path, 0).size == 32_000
    with pytest.raises(AudioError, match="not finite"):
        load(path, 1)


@pytest.mark.parametrize("subtype", ["ULAW", "ALAW"])
def test_telephone_recordings(tmp_path, subtype):
    samples = np.concatenate((speech(3.0, 8_000, 1), 0.3 * speech(3.0, 8_000, 1)[::-1]), axis=1)
    path = tmp_path / "call.wav"
    soundfile.write(path, samples, 8_000, subtype=subtype)
    for channel in range(2):
        read = load(path, channel, sampling_rate=8_000)
        error = np.sqrt(np.mean((read - samples[:, channel]) ** 2) / np.mean(samples[:, channel] ** 2))
        assert error < 0.02  # G.711 has about 38 dB of signal to noise
    assert np.array_equal(load(path, 1, 1.0, 2.0, 8_000), load(path, 1, sampling_rate=8_000)[8_000:16_000])
