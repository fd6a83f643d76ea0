"""Voice activity in streams: as silero-vad finds it, whatever the blocks."""

import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_adapter.errors import AudioError, ConfigError, MissingDependencyError
from mal_adapter.ser.turns.detector import SpeechDetector
from mal_adapter.ser.turns.speech import HYSTERESIS, LATE, ChannelSpeech, Speech
from mal_adapter.ser.turns.turn import TurnSettings
from mal_adapter.ser.turns.voice import VoiceActivity

Samples = npt.NDArray[np.float32]
RATES = (8_000, 16_000)


@pytest.fixture
def call(spoken: Samples) -> Samples:
    """Two channels at 8 kHz: speech in turns, with some noise."""
    speech = soxr.resample(spoken, 16_000, 8_000)
    pause = np.zeros(12_000, dtype=np.float32)
    quiet = np.zeros_like(speech)
    first, second = np.concatenate((pause, speech, pause, quiet)), np.concatenate((pause, quiet, speech, pause))
    noise = np.random.default_rng(0).normal(0, 0.001, (first.size, 2))
    return (np.stack((first, second), axis=1) + noise).astype(np.float32)


def reference(samples: Samples, rate: int) -> npt.NDArray[np.float32]:
    """The probabilities by silero-vad's own network, window by window."""
    spec = find_spec("silero_vad")
    assert spec is not None
    assert spec.origin is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = torch.jit.load(str(Path(spec.origin).parent / "data" / "silero_vad.jit"))
    network.reset_states()
    window = rate * 32 // 1000
    with torch.no_grad():
        answers = [
            network(torch.from_numpy(samples[start : start + window].T.copy()), rate)[:, 0].numpy()
            for start in range(0, len(samples) - window + 1, window)
        ]
    return np.stack(answers)


@pytest.mark.parametrize("rate", RATES)
def test_probabilities_are_those_of_silero_vad(rate: int, spoken: Samples):
    speech = soxr.resample(spoken, 16_000, rate)
    samples = np.stack((speech, 0.1 * speech[::-1], np.random.default_rng(1).normal(0, 0.1, speech.size)), axis=1)
    samples = samples.astype(np.float32)
    found = VoiceActivity(rate, channels=3).feed(samples)
    wanted = reference(samples, rate)
    assert found.shape == wanted.shape
    assert found[:, 0].max() > 0.99
    assert found[:, 2].mean() < 0.2
    np.testing.assert_allclose(found, wanted, atol=1e-4)  # rounding in float32, through the recurrence


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(0, 700), max_size=12))
def test_blocks_of_any_size_change_nothing(sizes: list[int]):
    samples = np.random.default_rng(2).normal(0, 0.1, (3_000, 2)).astype(np.float32)
    whole = VoiceActivity(8_000, channels=2).feed(samples)
    voice = VoiceActivity(8_000, channels=2)
    found = [voice.feed(block) for block in np.split(samples, np.cumsum(sizes))]
    np.testing.assert_allclose(np.concatenate(found), whole, atol=1e-5)


@settings(max_examples=200, deadline=None)
@given(
    probabilities=st.lists(st.floats(0, 1), min_size=1, max_size=120),
    threshold=st.sampled_from([0.3, 0.5, 0.8]),
    min_s=st.sampled_from([0.0, 0.05, 0.25]),
    merge_s=st.sampled_from([0.01, 0.1, 0.3]),
)
def test_starts_and_ends_are_those_of_silero_vad(
    probabilities: list[float], threshold: float, min_s: float, merge_s: float
):
    probabilities = probabilities + [0.0] * 20
    from silero_vad.utils_vad import get_speech_timestamps_from_probs

    wanted = get_speech_timestamps_from_probs(
        probabilities,
        sampling_rate=8_000,
        threshold=threshold,
        neg_threshold=threshold - HYSTERESIS,
        min_speech_duration_ms=min_s * 1000,
        min_silence_duration_ms=merge_s * 1000,
        speech_pad_ms=0,
    )
    channel = ChannelSpeech(0, 8_000, 256, TurnSettings(threshold=threshold, min_s=min_s, merge_s=merge_s))
    found = channel.feed(probabilities, [0.0] * len(probabilities)) + channel.finish(len(probabilities) * 256)
    # What the network counts as speech after its end is taken off.
    ends = [max(speech["start"] + 1, speech["end"] - LATE * 256) for speech in wanted]
    assert found == [Speech(speech["start"] / 8_000, end / 8_000) for speech, end in zip(wanted, ends, strict=True)]


@settings(max_examples=100, deadline=None)
@given(
    spoken=st.lists(st.tuples(st.booleans(), st.integers(1, 60)), min_size=1, max_size=12),
    powers=st.lists(st.floats(0, 1), min_size=8, max_size=8),
    max_s=st.sampled_from([0.6, 1.0, 2.5]),
    pad_s=st.sampled_from([0.0, 0.1, 0.4]),
)
def test_long_speech_is_split_into_parts_that_follow_each_other(
    spoken: list[tuple[bool, int]], powers: list[float], max_s: float, pad_s: float
):
    probabilities = [float(speaks) for speaks, count in spoken for _ in range(count)]
    levels = (powers * len(probabilities))[: len(probabilities)]
    end = len(probabilities) * 256

    def find(limit: float | None) -> list[Speech]:
        channel = ChannelSpeech(0, 8_000, 256, TurnSettings(max_s=limit, pad_s=pad_s))
        return channel.feed(probabilities, levels) + channel.finish(end)

    whole, parts = find(None), find(max_s)
    assert all(part.end_s - part.start_s <= max(max_s - 2 * pad_s, max_s / 2) + 1e-9 for part in parts)
    joined: list[Speech] = []
    for part in parts:
        if joined and joined[-1].end_s == part.start_s:
            joined[-1] = Speech(joined[-1].start_s, part.end_s)
        else:
            joined.append(part)
    assert [speech.start_s for speech in joined] == [speech.start_s for speech in whole]
    # A last part shorter than a turn is lost, as short speech is. A cut may be in what is taken off at the end.
    assert all(-0.064 <= w.end_s - j.end_s + 1e-9 < 0.25 for w, j in zip(whole, joined, strict=True))


def test_long_speech_is_split_at_its_quietest_place():
    powers = [1.0] * 100
    powers[68:73] = [0.01] * 5
    channel = ChannelSpeech(0, 8_000, 256, TurnSettings(max_s=3.0))
    found = channel.feed([0.9] * 100, powers) + channel.finish(100 * 256)
    assert [round(speech.end_s / 0.032, 1) for speech in found] == [70.5, 100.0]


def test_turns_of_two_channels(call: Samples, spoken: Samples):
    detector = SpeechDetector(8_000, channels=2)
    found, since = [], []
    for start in range(0, len(call), 160):
        found += detector.feed(call[start : start + 160])
        since.append([detector.speaking_since(channel) for channel in range(2)])
    found += detector.finish()
    length_s = spoken.size / 16_000
    assert [speech.channel for speech in found] == [0, 1]
    for speech, start_s in zip(found, (1.5, 1.5 + length_s), strict=True):
        assert abs(speech.start_s - start_s) < 0.15
        assert abs(speech.end_s - start_s - length_s) < 0.15
    assert since[50] == [None, None]
    assert since[300] == [found[0].start_s, None]
    assert since[600] == [None, found[1].start_s]
    assert since[-1] == [None, None]
    assert detector.position_s == len(call) / 8_000
    assert detector.finish() == []


def test_channels_do_not_influence_each_other(call: Samples):
    both = SpeechDetector(8_000, channels=2)
    found = both.feed(call) + both.finish()
    for channel in range(2):
        alone = SpeechDetector(8_000)
        wanted = alone.feed(call[:, channel]) + alone.finish()
        assert [(s.start_s, s.end_s) for s in found if s.channel == channel] == [(s.start_s, s.end_s) for s in wanted]


def test_many_streams_in_many_threads(call: Samples):
    def find(shift: int) -> list[Speech]:
        detector = SpeechDetector(8_000, channels=2)
        found = []
        for start in range(shift, len(call), 400):
            found += detector.feed(call[start : start + 400])
        return found + detector.finish()

    shifts = [0, 1_000, 2_000, 3_000, 4_000, 5_000]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(find, shifts)) == [find(shift) for shift in shifts]


def test_the_state_does_not_grow():
    import pickle

    detector = SpeechDetector(8_000, settings=TurnSettings(max_s=2.0))
    noise = np.random.default_rng(3).normal(0, 0.1, 8_000).astype(np.float32)
    detector.feed(noise)
    before = len(pickle.dumps(detector._channels)) + detector._rest.nbytes + detector._voice._rest.nbytes
    for _ in range(200):
        detector.feed(noise)
    after = len(pickle.dumps(detector._channels)) + detector._rest.nbytes + detector._voice._rest.nbytes
    assert after < before + 2_000


def test_speech_to_the_end_of_the_stream_ends_there(spoken: Samples):
    detector = SpeechDetector(16_000)
    assert detector.feed(spoken[:30_001]) == []
    assert detector.speaking_since() is not None
    (speech,) = detector.finish()
    assert speech.end_s == 30_001 / 16_000


def test_what_is_no_stream_of_samples_is_refused():
    detector = SpeechDetector(8_000, channels=2)
    for wrong in (np.zeros(100), np.zeros((100, 3)), np.zeros((10, 2), dtype=np.int16)):
        with pytest.raises(ConfigError, match="samples must"):
            detector.feed(wrong)
    with pytest.raises(AudioError, match="not finite"):
        detector.feed(np.full((100, 2), np.nan))
    assert detector.position_s == 0
    with pytest.raises(ConfigError, match="from 0 to 1, got 2"):
        detector.speaking_since(2)
    detector.finish()
    with pytest.raises(ConfigError, match="was finished"):
        detector.feed(np.zeros((100, 2)))
    with pytest.raises(ConfigError, match="got 44100"):
        SpeechDetector(44_100)
    with pytest.raises(ConfigError, match="got 0"):
        SpeechDetector(8_000, channels=0)


def test_nothing_of_torch_changes_for_the_process():
    code = """
import torch
import numpy as np
from mal_adapter.ser.turns.detector import SpeechDetector
torch.set_num_threads(2)
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
torch.manual_seed(7)
drawn = torch.rand(1, device="cpu")
torch.manual_seed(7)
SpeechDetector(8000).feed(np.zeros(800, dtype=np.float32))
print(torch.get_num_threads(), torch.rand(1, device="cpu").equal(drawn))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 True\n"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    from mal_adapter.ser.turns import voice

    monkeypatch.setitem(sys.modules, "silero_vad", None)
    monkeypatch.delitem(sys.modules, "silero_vad")
    monkeypatch.setattr("mal_adapter.extras.find_spec", lambda package: None)
    voice._layers.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"silero_vad, which is not .* 'mal-adapter\[recordings\]'"):
        SpeechDetector(8_000)
