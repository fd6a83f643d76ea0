"""Turns of recordings: per channel or mixed, in blocks, in order."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from mal_adapter.errors import AudioError, AudioFormatError, ConfigError, TurnError
from mal_adapter.ser.turns import Turn, TurnSettings, find_turns
from tests.spoken_calls import Call, have_voices, make_call, share_found, write_call

Samples = npt.NDArray[np.float32]
pytestmark = pytest.mark.skipif(not have_voices(), reason="espeak-ng is not installed")


@pytest.fixture(scope="module")
def call() -> Call:
    return make_call(60, 3, overlap=0.3, noise_db=-45.0, crosstalk_db=22.0)


@pytest.fixture(scope="module")
def path(call: Call, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_call(tmp_path_factory.mktemp("calls") / "call.wav", call)


def test_a_call_has_the_turns_that_were_spoken(path: Path, call: Call):
    turns = list(find_turns(path, channels=["customer", "agent"]))
    assert share_found(turns, call.turns) >= 0.95
    assert len(turns) <= len(call.turns) + 1
    assert turns == sorted(turns)
    assert all(turn.speaker == ["customer", "agent"][turn.channel or 0] for turn in turns)
    overlapped = [
        any(min(t.end_s, o.end_s) - max(t.start_s, o.start_s) > 0.2 for o in call.turns if o.channel != t.channel)
        for t in call.turns
    ]
    assert 0 < sum(overlapped) < len(overlapped)
    assert abs(sum(turn.overlaps for turn in turns) - sum(overlapped)) <= 2


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_rates_and_formats(tmp_path: Path, rate: int, suffix: str):
    call = make_call(20, 4, sampling_rate=rate, crosstalk_db=None)
    path = tmp_path / f"call.{suffix}"
    soundfile.write(path, call.samples, rate)
    assert share_found(list(find_turns(path, ["A", "B"])), call.turns) >= 0.9


def test_a_mixed_recording_has_one_unknown_speaker(path: Path, call: Call, tmp_path: Path):
    mono = tmp_path / "mono.wav"
    soundfile.write(mono, call.samples.mean(axis=1), call.sampling_rate, subtype="FLOAT")
    stereo = tmp_path / "stereo.wav"
    soundfile.write(stereo, call.samples, call.sampling_rate, subtype="FLOAT")
    turns = list(find_turns(stereo))
    assert turns == list(find_turns(mono))
    assert {(turn.speaker, turn.channel, turn.overlaps) for turn in turns} == {("?", None, False)}
    (named,) = {turn.channel for turn in find_turns(mono, channels=["caller"])}
    assert named == 0
    spoken = [turn for turn in call.turns if not any(t.start_s < turn.start_s < t.end_s + 0.3 for t in call.turns)]
    assert all(any(t.start_s < s.start_s + 0.1 and t.end_s > s.end_s - 0.1 for t in turns) for s in spoken)


def test_no_turn_is_longer_than_the_host_accepts(path: Path):
    turns = list(find_turns(path, ["A", "B"], max_s=1.5))
    assert max(turn.duration_s for turn in turns) <= 1.5
    assert turns == list(find_turns(path, ["A", "B"], TurnSettings(max_s=1.5), max_s=30.0))
    whole = list(find_turns(path, ["A", "B"]))
    assert len(turns) > len(whole) > 0
    for turn in whole:  # nothing but padding is lost
        parts = [t for t in turns if t.channel == turn.channel and t.start_s < turn.end_s and t.end_s > turn.start_s]
        assert sum(part.duration_s for part in parts) > turn.duration_s - 0.3


def test_turns_come_while_the_recording_is_read(path: Path, monkeypatch: pytest.MonkeyPatch):
    from mal_adapter.ser.turns import detect

    read = []

    def counted(*args: object, **options: object) -> object:
        for block in blocks(*args, **options):  # type: ignore[arg-type]
            read.append(len(block))
            yield block[: len(block) // 2]
            yield block[len(block) // 2 :]

    blocks = detect.recording_blocks
    monkeypatch.setattr(detect, "recording_blocks", counted)
    turns = find_turns(path, ["A", "B"])
    assert read == []
    assert next(turns).start_s < 5
    assert len(read) == 1
    whole = [next(find_turns(path, ["A", "B"])), *turns]
    monkeypatch.undo()
    assert whole == list(find_turns(path, ["A", "B"]))


def test_silence_has_no_turns(tmp_path: Path):
    path = tmp_path / "silence.wav"
    for samples in (np.zeros((40_000, 2)), np.zeros((1, 2)), np.zeros((40_000, 1))):
        soundfile.write(path, samples, 8_000)
        assert list(find_turns(path)) == []
        assert list(find_turns(path, [f"speaker {n}" for n in range(samples.shape[1])])) == []


def test_names_must_fit_the_channels(path: Path, call: Call, tmp_path: Path):
    for names in (["A"], ["A", "B", "C"], []):
        with pytest.raises(TurnError, match=f"has 2 channels, and {len(names)} name"):
            find_turns(path, names)
    with pytest.raises(TurnError, match="its own name, got A, A"):
        find_turns(path, ["A", "A"])
    with pytest.raises(TurnError, match="needs a name, got ' '"):
        find_turns(path, ["A", " "])
    with pytest.raises(ConfigError, match="the string 'AB'"):
        find_turns(path, "AB")
    with pytest.raises(ConfigError, match="max_s must be"):
        find_turns(path, ["A", "B"], max_s=0.1)
    same = tmp_path / "same.wav"
    soundfile.write(same, np.repeat(call.samples[:, :1], 2, axis=1), call.sampling_rate)
    with pytest.raises(TurnError, match="have the same sound"):
        list(find_turns(same, ["A", "B"]))
    assert list(find_turns(same))


def test_files_that_are_no_recordings(path: Path, call: Call, tmp_path: Path):
    with pytest.raises(AudioError, match="no such file"):
        find_turns(tmp_path / "missing.wav")
    text = tmp_path / "text.wav"
    text.write_text("hello")
    with pytest.raises(AudioFormatError, match="can not be read as audio"):
        find_turns(text)
    cut = tmp_path / "cut.wav"
    cut.write_bytes(path.read_bytes()[:200_000])
    with pytest.raises(AudioError, match="cut short"):
        find_turns(cut)
    inverted = tmp_path / "inverted.wav"
    soundfile.write(inverted, call.samples[:, :1] * [[1, -1]], call.sampling_rate)
    with pytest.raises(AudioError, match="cancel each other"):
        list(find_turns(inverted))
    infinite = tmp_path / "infinite.wav"
    samples = call.samples.copy()
    samples[300_000] = np.inf
    soundfile.write(infinite, samples, call.sampling_rate, subtype="FLOAT")
    turns = find_turns(infinite)
    assert isinstance(next(turns), Turn)  # what is before the damage
    with pytest.raises(AudioError, match="not finite"):
        list(turns)


def test_an_hour_needs_no_more_memory_than_minutes(call: Call, tmp_path: Path):
    def peak(minutes: int) -> float:
        path = tmp_path / f"{minutes}.wav"
        with soundfile.SoundFile(path, "w", call.sampling_rate, 2, "ULAW") as file:
            for _ in range(minutes):
                file.write(call.samples)
        code = (
            "import resource, sys; from mal_adapter.ser.turns import find_turns; "
            "count = sum(1 for _ in find_turns(sys.argv[1], ['A', 'B'])); "
            "print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
        )
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
        count, mebibytes = done.stdout.split()
        assert int(count) > 10 * minutes
        return float(mebibytes)

    # An hour of this would be 220 MiB as floats at 8 kHz.
    assert peak(20) < peak(2) + 40
