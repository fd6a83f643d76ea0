"""A part of a sound file equals the same part of the whole, and costs about what the part costs."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_adapter.errors import AudioError
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.recognizer import audio
from mal_adapter.ser.recognizer.audio import load_waveform
from mal_adapter.ser.recognizer.sound import kept, layout, mpeg
from mal_adapter.ser.recognizer.sound.reader import Sound
from tests.ser.odd_sounds import CONTAINERS, encode, flac_with_total, speech, without_xing

DURATION_S = 6.0


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """recording(name, rate, channels) -> the path of a file of 6 s, made once."""
    folder = tmp_path_factory.mktemp("recordings")

    def made(name, rate, channels=1):
        path = folder / f"{name}-{rate}-{channels}"
        if not path.exists():
            base = name.removesuffix("-streamed")
            content = encode(base, speech(DURATION_S, rate, channels), rate)
            if name != base:
                content = flac_with_total(content, 0) if base == "flac" else without_xing(content)
            path.write_bytes(content)
        return path

    return made


def load(path, start_s=None, end_s=None, sampling_rate=16_000):
    return load_waveform(Utterance("d", "0", "A", path, start_s, end_s), sampling_rate)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_part_equals_the_same_part_of_the_whole(recording, data):
    name = data.draw(st.sampled_from([*CONTAINERS, "flac-streamed", "mp3-streamed", "mp3-vbr-streamed"]))
    encoding = CONTAINERS[name.removesuffix("-streamed")]
    rate = data.draw(st.sampled_from(encoding.rates))
    channels = data.draw(st.integers(1, encoding.channels))
    target = data.draw(st.sampled_from([8_000, 16_000, 22_050, 24_000, 44_100]))
    path = recording(name, rate, channels)
    whole = load(path, sampling_rate=target)
    start_s = data.draw(st.floats(0, DURATION_S - 0.05))
    end_s = data.draw(st.one_of(st.none(), st.floats(start_s + 0.03, DURATION_S)))
    part = load(path, start_s, end_s, target)
    expected = whole[round(start_s * target) :][: part.size]
    assert part.size == (whole.size if end_s is None else round(end_s * target)) - round(start_s * target)
    # Opus predicts from what it decoded before, and forgets that slowly.
    assert np.abs(part - expected).max() < (5e-3 if name == "opus" else 2e-6)


@pytest.mark.parametrize("name", ["wav", "flac", "mp3", "mp3-vbr", "mp3-vbr-streamed", "vorbis", "opus"])
def test_parts_that_follow_each_other_are_the_whole(name, recording, capfd):
    path = recording(name, 48_000, 2)
    parts = [load(path, start_s, start_s + 0.25) for start_s in np.arange(0, DURATION_S, 0.25)]
    assert np.allclose(np.concatenate(parts), load(path)[: round(DURATION_S * 16_000)], atol=2e-6)
    assert capfd.readouterr().err == ""


@pytest.fixture
def decoded(monkeypatch):
    """The frames of each block that was decoded."""
    counts: list[int] = []
    read = Sound._read
    monkeypatch.setattr(Sound, "_read", lambda self, frames: counts.append(frames) or read(self, frames))
    return counts


@pytest.mark.parametrize(
    "name", ["wav-ulaw", "wav-ima", "flac", "flac-streamed", "mp3", "mp3-streamed", "vorbis", "opus"]
)
def test_only_a_part_is_decoded(name, decoded, tmp_path):
    base = name.removesuffix("-streamed")
    content = encode(base, speech(60.0, 16_000), 16_000)
    if name != base:
        content = flac_with_total(content, 0) if base == "flac" else without_xing(content)
    path = tmp_path / "call"
    path.write_bytes(content)
    for start_s in (0.0, 20.0, 40.0, 10.0):
        decoded.clear()
        assert load(path, start_s, start_s + 3).size == 48_000
        # An MP3's places are 32 frames apart, and lossy decoders need a second before a part.
        longest_s = {"mp3": 5.3, "vorbis": 4.1, "opus": 4.1}.get(base, 3.1)
        assert 48_000 <= sum(decoded) <= longest_s * 16_000


@pytest.mark.parametrize("name", ["wav", "wav-gsm", "flac", "mp3", "vorbis"])
def test_memory_is_bounded_by_the_part(name, tmp_path):
    path = tmp_path / "call"
    path.write_bytes(encode(name, speech(240.0, 8_000), 8_000))
    load(path, 1.0, 2.0)
    tracemalloc.start()
    load(path, 200.0, 201.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 2**20  # the whole has 15 MB at 16 kHz; a block of 2**17 samples is measured in float64


def test_the_frames_of_an_mp3_are_counted_once_for_its_utterances(recording, monkeypatch):
    path = recording("mp3-vbr", 44_100)
    counted = []
    original = mpeg._count
    monkeypatch.setattr(mpeg, "_count", lambda *a: counted.append(a) or original(*a))
    monkeypatch.setattr(kept, "_SETTLED_S", -1e9)
    monkeypatch.setattr(layout, "_kept", kept.Kept(32))
    for start_s in (0.0, 1.0, 2.0, 3.0):
        load(path, start_s, start_s + 1)
    assert len(counted) == 1


def test_the_lengths_of_a_bounded_number_of_files_are_kept(write_audio, monkeypatch):
    monkeypatch.setattr(kept, "_SETTLED_S", -1e9)
    monkeypatch.setattr(layout, "_kept", kept.Kept(3))
    for number in range(5):
        load(write_audio(f"{number}.wav"))
    assert len(layout._kept._results) == 3


def test_a_new_file_of_the_same_size_and_time_is_read_again(write_audio):
    first = load(write_audio("tone.flac", pitch_hz=200.0))
    path = write_audio("tone.flac", pitch_hz=200.0)
    content = path.read_bytes()
    path.write_bytes(flac_with_total(content, 0))
    assert np.array_equal(load(path), first)
    path.write_bytes(flac_with_total(content, 1 << 30))
    with pytest.raises(AudioError, match="cut short"):
        load(path)


def test_a_whole_recording_is_decoded_once_and_its_parts_never(recording, monkeypatch):
    whole = []
    original = audio._decode
    monkeypatch.setattr(audio, "_decode", lambda *a: whole.append(a) or original(*a))
    path = recording("wav", 8_000)
    load(path)
    load(path, 1.0, 2.0)
    assert len(whole) == 1


def test_threads_read_parts_of_one_file(recording):
    path = recording("flac", 44_100, 2)
    whole = load(path)
    starts = [0.5 * n for n in range(11)]
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda start_s: load(path, start_s, start_s + 0.5), starts))
    for start_s, part in zip(starts, parts, strict=True):
        assert np.allclose(part, whole[round(start_s * 16_000) :][:8_000], atol=2e-6)


@pytest.mark.parametrize("times", [(6.0, None), (7.0, 8.0), (5.0, 6.2), (0.0, 6.11)])
def test_beyond_the_end(times, recording):
    with pytest.raises(AudioError, match=r"the file lasts 6\.00 s; check start_s and end_s"):
        load(recording("vorbis", 16_000), *times)


def test_a_rounded_annotation_at_the_end(recording):
    assert load(recording("wav", 16_000), 5.5, 6.05).size == 8_000
    with pytest.raises(AudioError, match=r"is empty|silent"):
        load(recording("wav", 16_000), 5.99999, 6.0)
