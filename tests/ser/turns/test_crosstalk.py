"""Speech that another channel has louder at the same time is crosstalk; real speech of two people is not."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_adapter.ser.turns.crosstalk import Crosstalk
from mal_adapter.ser.turns.detector import SpeechDetector
from mal_adapter.ser.turns.speech import Speech
from mal_adapter.ser.turns.turn import TurnSettings
from tests.spoken_calls import VOICES, have_voices, make_call, say

Samples = npt.NDArray[np.float32]
spoken = pytest.mark.skipif(not have_voices(), reason="espeak-ng is not installed")


def find(samples: Samples, settings: TurnSettings | None = None, block: int = 100_000) -> list[Speech]:
    detector = SpeechDetector(16_000, samples.shape[1], settings)
    found = []
    for start in range(0, len(samples), block):
        found += detector.feed(samples[start : start + block])
    return found + detector.finish()


def copied(speech: Samples, quieter_db: float, delay_s: float) -> Samples:
    """One channel with the speech, and another with a quieter copy."""
    samples = np.zeros((speech.size + 32_000, 2), dtype=np.float32)
    samples[16_000 : 16_000 + speech.size, 0] = speech
    start = 16_000 + round(delay_s * 16_000)
    samples[start : start + speech.size, 1] = 10 ** (-quieter_db / 20) * speech
    return samples + np.random.default_rng(0).normal(0, 1e-4, samples.shape).astype(np.float32)


@spoken
@pytest.mark.parametrize("quieter_db", [14.0, 20.0, 30.0])
@pytest.mark.parametrize("delay_s", [0.0, 0.005, 0.02, 0.05])
def test_a_quieter_copy_is_no_speech(quieter_db: float, delay_s: float):
    speech = say("I would like to talk to somebody who can really decide", "en-us+m3")
    samples = copied(speech, quieter_db, delay_s)
    assert {speech.channel for speech in find(samples[:, 1:])} == {0}  # alone, the copy is speech
    assert [speech.channel for speech in find(samples)] == [0]
    assert [speech.channel for speech in find(samples[:, ::-1])] == [1]
    assert {speech.channel for speech in find(samples, TurnSettings(crosstalk_db=60.0))} == {0, 1}


@spoken
@pytest.mark.parametrize("quieter_db", [0.0, 6.0, 15.0])
def test_two_people_who_speak_at_once_are_both_found(quieter_db: float):
    first = say("we can send you a new one by the end of this week", "en-gb+f2")
    second = say("no I did not get any letter from you at all", "de+m1")
    samples = np.zeros((max(first.size, second.size) + 32_000, 2), dtype=np.float32)
    samples[16_000 : 16_000 + first.size, 0] = first
    samples[16_000 : 16_000 + second.size, 1] = 10 ** (-quieter_db / 20) * second
    lengths = {0: first.size / 16_000, 1: second.size / 16_000}
    found = find(samples)
    assert {speech.channel for speech in found} == {0, 1}
    for channel, length_s in lengths.items():
        assert sum(s.end_s - s.start_s for s in found if s.channel == channel) > 0.8 * length_s


@spoken
@pytest.mark.parametrize("number", range(len(VOICES)))
def test_calls_with_crosstalk_have_the_turns_of_calls_without(number: int):
    options = {"sampling_rate": 16_000, "voices": VOICES[number], "noise_db": -50.0, "overlap": 0.3}
    clean = make_call(60, number, crosstalk_db=None, **options)  # type: ignore[arg-type]
    mixed = make_call(60, number, crosstalk_db=20.0, **options)  # type: ignore[arg-type]
    wanted, found = find(clean.samples), find(mixed.samples)
    near = [
        any(o.channel == s.channel and abs(o.start_s - s.start_s) < 0.2 and abs(o.end_s - s.end_s) < 0.2 for o in found)
        for s in wanted
    ]
    assert len(found) <= len(wanted) + 1
    assert sum(near) >= len(near) - 1


@spoken
def test_the_size_of_blocks_changes_nothing():
    call = make_call(30, 5, sampling_rate=16_000, crosstalk_db=18.0, overlap=0.4)
    whole = find(call.samples)
    assert len({speech.channel for speech in whole}) == 2
    for block in (320, 1_111, 40_000):
        assert sorted(find(call.samples, block=block)) == sorted(whole)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), sizes=st.lists(st.integers(0, 40), max_size=6), channels=st.integers(2, 3))
def test_every_window_comes_once_and_in_order(seed: int, sizes: list[int], channels: int):
    rng = np.random.default_rng(seed)
    count = 120
    samples = rng.normal(0, 0.1, (count * 256, channels)).astype(np.float32)
    samples *= np.repeat(10 ** rng.uniform(-3, 0, (count // 10, channels)), 2_560, axis=0).astype(np.float32)
    samples[:, 1] += 0.1 * samples[:, 0]
    rows = np.stack((rng.random((count, channels)), np.square(samples).reshape(count, 256, channels).mean(axis=1)), 2)
    rows = rows.astype(np.float32)

    def run(edges: list[int]) -> list[npt.NDArray[np.float32]]:
        crosstalk = Crosstalk(channels, 8_000, TurnSettings(), 0.35)
        parts: list[list[npt.NDArray[np.float32]]] = [[] for _ in range(channels)]
        for first, end in zip([0, *edges], [*edges, count], strict=True):
            given = crosstalk.feed(samples[first * 256 : end * 256], rows[first:end], last=end == count)
            for channel, part in enumerate(given):
                parts[channel].append(part)
        return [np.concatenate(part) for part in parts]

    whole = run([])
    for channel, part in enumerate(whole):
        np.testing.assert_array_equal(part[:, 1], rows[:, channel, 1])
        assert np.isin(part[:, 0], [0, *rows[:, channel, 0]]).all()
    edges = [int(edge) for edge in np.cumsum(sizes) if edge < count]
    for part, same in zip(run(edges), whole, strict=True):
        np.testing.assert_array_equal(part, same)


def test_what_is_kept_does_not_grow():
    crosstalk = Crosstalk(2, 8_000, TurnSettings(), 0.35)
    rng = np.random.default_rng(0)
    kept = []
    for _ in range(60):
        samples = rng.normal(0, 0.1, (2_560, 2)).astype(np.float32)
        samples[:, 1] = 0.05 * samples[:, 0]
        rows = np.stack((np.full((10, 2), 0.9), np.square(samples).reshape(10, 256, 2).mean(axis=1)), axis=2)
        crosstalk.feed(samples, rows.astype(np.float32))
        kept.append(crosstalk._levels.nbytes + crosstalk._rows.nbytes)
    assert max(kept[10:]) <= max(kept[:10])
