"""Silence is measured without the offset, per channel; channels that cancel are no silence."""

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_adapter.errors import AudioError
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.recognizer.audio import load_waveform
from tests.ser.odd_sounds import CONTAINERS, encode, speech


@pytest.fixture
def load(tmp_path):
    def loaded(content, **times):
        path = tmp_path / "sound"
        path.write_bytes(content)
        return load_waveform(Utterance("d", "0", "A", path, **times))

    return loaded


def constant(level, rate, duration_s=2.0):
    """(samples, channels) for a level of each channel."""
    return np.tile(np.float32(level), (round(rate * duration_s), 1))


def wav(samples, rate=16_000, subtype="FLOAT"):
    import io

    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype=subtype)
    return file.getvalue()


# GSM 6.10 answers a constant with a tone of its own.
@pytest.mark.parametrize("name", [name for name in CONTAINERS if name != "wav-gsm"])
def test_a_constant_is_silent_in_every_encoding(name, load):
    encoding = CONTAINERS[name]
    for rate in {encoding.rates[0], encoding.rates[-1]}:
        for level in (0.02, -0.5):
            content = encode(name, constant([level], rate), rate)
            with pytest.raises(AudioError, match="silent"):
                load(content)
            with pytest.raises(AudioError, match="silent"):
                load(content, start_s=0.7, end_s=1.5)


@settings(deadline=None, max_examples=40)
@given(
    level=st.floats(-1e6, 1e6, width=32),
    other=st.floats(-1, 1, width=32),
    rate=st.sampled_from([8_000, 16_000, 44_100]),
    frames=st.integers(1, 5_000),
)
def test_a_constant_is_silent_at_any_level(level, other, rate, frames, tmp_path_factory):
    path = tmp_path_factory.mktemp("constant") / "sound.wav"
    for levels in ([level], [level, other], [level, -level]):
        path.write_bytes(wav(np.tile(np.float32(levels), (frames, 1)), rate))
        with pytest.raises(AudioError, match="silent"):
            load_waveform(Utterance("d", "0", "A", path))


def test_the_message_describes_the_silence(load):
    with pytest.raises(AudioError, match=r"nothing but an offset of up to 0\.0200"):
        load(wav(constant([0.02], 8_000), 8_000))
    with pytest.raises(AudioError, match="all samples are zero"):
        load(wav(constant([0.0, 0.0], 8_000), 8_000))
    with pytest.raises(AudioError, match="its peak is -100 dBFS"):
        load(wav(constant([1e-5], 8_000), 8_000))


def test_drift_and_a_resampled_constant_are_silent(load):
    time_s = np.arange(32_000) / 16_000
    for drift in (0.1 * time_s, 0.05 * time_s**2, 0.02 * np.sin(2 * np.pi * 0.5 * time_s), 0.3 * np.exp(-time_s)):
        with pytest.raises(AudioError, match="silent"):
            load(wav(drift))
    import soxr

    with pytest.raises(AudioError, match="silent"):  # it rings where the constant begins and ends
        load(wav(soxr.resample(np.full(96_000, 0.3), 48_000, 16_000), subtype="PCM_16"))


@pytest.mark.parametrize("offset", [0.0, 0.02, -0.3])
@pytest.mark.parametrize("name", ["wav", "wav-8", "wav-ulaw", "flac", "mp3", "vorbis", "opus"])
def test_speech_with_an_offset_is_not_silent(name, offset, load):
    samples = speech(1.0, 16_000) + np.float32(offset)
    assert load(encode(name, samples, 16_000)).size == pytest.approx(16_000, abs=400)


@pytest.mark.parametrize("level", [3e-4, 1e-3, 0.1])
def test_quiet_sound_short_sound_and_a_word_in_silence_are_not_silent(level, load):
    word = np.float32(level / 0.3) * speech(0.1)
    assert load(wav(word)).size == 1600
    silence = np.zeros((16_000, 1), dtype=np.float32)
    for pieces in ([silence, word, silence], [word, silence], [silence, word]):
        assert load(wav(np.concatenate(pieces))).size > 16_000
        with pytest.raises(AudioError, match="silent"):
            load(wav(np.concatenate([word, silence, silence])), start_s=0.5)
    assert load(wav(word[:200])).size == 200


@pytest.mark.parametrize("name", ["mp3", "vorbis", "opus"])
def test_a_word_that_was_padded_to_seconds_before_it_was_encoded(name, load):
    word, silence = speech(0.3), np.zeros((32_000, 1), dtype=np.float32)
    for pieces in ([word, silence], [silence, word]):
        assert load(encode(name, np.concatenate(pieces), 16_000)).size == pytest.approx(36_800, abs=400)


@pytest.mark.parametrize("gain", [-1.0, -0.97, -1.05, -0.85])
@pytest.mark.parametrize("name", ["wav", "wav-8", "flac", "mp3", "vorbis", "opus", "au-ulaw"])
def test_an_inverted_channel_is_an_error(name, gain, load):
    one = speech(1.5)
    with pytest.raises(AudioError, match=r"channels cancel each other.*pan=mono"):
        load(encode(name, np.concatenate([one, gain * one], axis=1), 16_000))


def test_channels_that_cancel_in_a_part_of_the_time_or_among_others(load):
    one, other = speech(2.0), speech(2.0, seed=1)
    inverted = -one
    inverted[:16_000] *= -1
    for channels in ([one, inverted], [one, -one, 0 * one], [one, -one, one, -one], [one + 0.4, -one - 0.2]):
        with pytest.raises(AudioError, match="channels cancel"):
            load(wav(np.concatenate(channels, axis=1)))
    assert load(wav(np.concatenate([one, -one, other, other], axis=1))).size == 32_000


@settings(deadline=None, max_examples=40)
@given(
    channels=st.integers(2, 8),
    alive=st.integers(1, 8),
    offset=st.floats(-0.9, 0.9),
    subtype=st.sampled_from(["PCM_16", "FLOAT"]),
)
def test_dead_channels_and_their_offsets_are_accepted(channels, alive, offset, subtype, tmp_path_factory):
    path = tmp_path_factory.mktemp("dead") / "sound.wav"
    samples = np.zeros((8_000, channels), dtype=np.float32)
    samples[:, : min(alive, channels)] = 0.3 * speech(0.5)
    samples[:, -1] += offset
    path.write_bytes(wav(samples, subtype=subtype))
    assert load_waveform(Utterance("d", "0", "A", path)).size == 8_000


def test_two_speakers_with_a_channel_each(load):
    left, right = speech(2.0), speech(2.0, seed=3)
    left[16_000:] *= 0
    right[:16_000] *= 0
    assert np.allclose(load(wav(np.concatenate([left, right], axis=1))), (left + right)[:, 0] / 2, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channel", [0, 1])
def test_a_value_that_is_not_finite_in_one_channel(value, channel, load):
    samples = speech(1.0, channels=2)
    samples[9_000, channel] = value
    with pytest.raises(AudioError, match="not finite"):
        load(wav(samples))
    assert load(wav(samples), end_s=0.5).size == 8_000  # nothing of it is in this part
