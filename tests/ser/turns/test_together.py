"""Many streams in one pass through the network: each gets what it gets alone."""

import numpy as np
import numpy.typing as npt
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_adapter.ser.turns.detector import SpeechDetector, speech_probabilities
from mal_adapter.ser.turns.voice import VoiceActivity, feed_together

Samples = npt.NDArray[np.float32]


@settings(max_examples=25, deadline=None)
@given(
    streams=st.lists(
        st.tuples(
            st.sampled_from([8_000, 16_000]), st.integers(1, 2), st.lists(st.integers(0, 1_500), min_size=3, max_size=3)
        ),
        max_size=6,
    )
)
def test_probabilities_are_those_of_each_stream_alone(streams: list[tuple[int, int, list[int]]]):
    rng = np.random.default_rng(4)
    blocks = [[rng.normal(0, 0.1, (n, ch)).astype(np.float32) for n in sizes] for _, ch, sizes in streams]
    alone = [VoiceActivity(rate, ch) for rate, ch, _ in streams]
    expected = [[voice.feed(block) for block in own] for voice, own in zip(alone, blocks, strict=True)]
    together = [VoiceActivity(rate, ch) for rate, ch, _ in streams]
    for turn in range(3):
        found = feed_together(together, [own[turn] for own in blocks])
        for one, wanted in zip(found, expected, strict=True):
            assert one.shape == wanted[turn].shape
            np.testing.assert_allclose(one, wanted[turn], atol=1e-5)
    for voice, other, (_, ch, _) in zip(together, alone, streams, strict=True):  # they continue alone
        more = rng.normal(0, 0.1, (2_000, ch)).astype(np.float32)
        np.testing.assert_allclose(voice.feed(more), other.feed(more), atol=1e-5)


def test_a_detector_takes_probabilities_in_parts(spoken: Samples):
    speech = soxr.resample(spoken, 16_000, 8_000)[:, np.newaxis]
    speech = np.concatenate((speech, np.zeros((8_000, 1), np.float32)))
    whole, parts = SpeechDetector(8_000), SpeechDetector(8_000)
    expected = whole.feed(speech) + whole.finish()
    samples = speech[: len(speech) // 256 * 256]
    (probabilities,) = speech_probabilities([parts], [samples])
    found = []
    for number in range(len(probabilities)):
        window = samples[number * 256 : (number + 1) * 256]
        found += parts.feed(window, probabilities[number : number + 1])
    found += parts.feed(speech[len(samples) :]) + parts.finish()
    assert found == expected
    assert len(expected) >= 1
    assert parts.position_s == pytest.approx(len(speech) / 8_000)
