"""What a page draws and plays of a recording is the recording."""

import io
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_adapter.errors import AudioError
from mal_adapter.ser.timeline.listening import _Peaks, listen


@settings(max_examples=60, deadline=None)
@given(
    frames=st.integers(1, 400),
    frames_per_part=st.floats(1.0, 90.0),
    cuts=st.lists(st.integers(0, 400), max_size=8),
    seed=st.integers(0, 2**32 - 1),
)
def test_peaks_do_not_depend_on_the_blocks(frames: int, frames_per_part: float, cuts: list[int], seed: int):
    samples = np.random.default_rng(seed).uniform(-1, 1, (frames, 2)).astype(np.float32)
    peaks = _Peaks([0, 1, None], frames, frames_per_part)
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 400], strict=True):
        if len(block := samples[start:end]):
            peaks.add(block)
    edges = [int(np.ceil(k * frames_per_part)) for k in range(frames + 1)]
    parts = [slice(low, high) for low, high in pairwise(edges) if low < frames]
    for channel in (0, 1, None):
        one = samples.mean(axis=1) if channel is None else samples[:, channel]
        expected = [[one[part].min(), one[part].max()] for part in parts]
        assert np.stack((peaks._low[channel], peaks._high[channel]), axis=1)[: len(parts)].tolist() == expected


@pytest.mark.parametrize("level", [1.0, 0.001])
def test_a_quiet_recording_is_drawn_as_a_loud_one_and_a_click_makes_it_no_smaller(level: float, tmp_path: Path):
    seconds = np.arange(30 * 8_000) / 8_000
    speech = level * 0.4 * np.sin(2 * np.pi * 100 * seconds) * (np.floor(seconds) % 3 == 0)
    speech[40_000] = level
    soundfile.write(tmp_path / "call.wav", np.stack([speech, np.zeros_like(speech)], axis=1), 8_000, subtype="FLOAT")
    peaks = listen(tmp_path / "call.wav", [0, 1], audio=False).peaks
    heights = peaks[0].max(axis=1).reshape(30, -1)
    assert heights[::3].min() > 120
    assert heights[1::3].max() == 0
    assert not peaks[1].any()


@pytest.mark.parametrize(
    ("rate", "channels", "kept_rate", "kept_channels"),
    [
        (8_000, 1, 8_000, 1),
        (16_000, 2, 16_000, 2),
        (44_100, 2, 16_000, 2),
        (48_000, 4, 16_000, 1),
        (6_000, 1, 16_000, 1),
    ],
)
def test_the_sound_is_the_recording_at_the_right_times(
    rate: int, channels: int, kept_rate: int, kept_channels: int, tmp_path: Path
):
    seconds = np.arange(20 * rate) / rate
    loud = (np.floor(seconds) % 2) * 0.5 * np.sin(2 * np.pi * 440 * seconds)  # a tone in every other second
    path = tmp_path / "call.wav"
    soundfile.write(path, np.stack([loud] * channels, axis=1), rate)
    found = listen(path, [None, 0, 7])
    assert list(found.peaks) == [None, 0]
    assert found.duration_s == 20.0
    assert len(found.mp3) < 20 * 48_000 / 8 * 1.05
    sound, sampling_rate = soundfile.read(io.BytesIO(found.mp3), always_2d=True)
    assert (sampling_rate, sound.shape[1]) == (kept_rate, kept_channels)
    assert abs(len(sound) / sampling_rate - 20) < 0.2
    middle = np.abs(sound[: 20 * sampling_rate].reshape(20, sampling_rate, -1)[:, sampling_rate // 4 :]).max(
        axis=(1, 2)
    )
    assert (middle > 0.3).tolist() == [False, True] * 10
    heights = found.peaks[0].reshape(20, -1).max(axis=1)
    assert (heights > 120).tolist() == [False, True] * 10


def test_an_hour_is_read_in_blocks(tmp_path: Path):
    path = tmp_path / "hour.wav"
    with soundfile.SoundFile(path, "w", 8_000, 2, "ULAW") as file:
        for _ in range(60):
            file.write(np.random.default_rng(0).uniform(-0.5, 0.5, (60 * 8_000, 2)))
    tracemalloc.start()
    found = listen(path, [0, 1], audio=False)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.mp3 is None
    assert len(found.peaks[0]) == 90_000
    assert most < 12e6  # the samples alone would take 230 MB


def test_a_file_that_is_no_sound_is_refused(tmp_path: Path):
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(AudioError, match=r"text\.wav: this can not be read as audio"):
        listen(tmp_path / "text.wav", [None])
