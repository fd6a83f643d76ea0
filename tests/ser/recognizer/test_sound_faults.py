"""Whatever is wrong with one sound file is an AudioError that names it, within bounded time and memory."""

import io
import os
import sys
import threading
import tracemalloc

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mal_adapter.errors import AudioError, MalAdapterError, MissingDependencyError
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.recognizer import audio
from mal_adapter.ser.recognizer.audio import load_waveform, sound_info
from mal_adapter.ser.recognizer.sound import reader
from tests.ser.odd_sounds import CONTAINERS, encode, flac_with_total, speech

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's files")


def load(path, start_s=None, end_s=None):
    return load_waveform(Utterance("d", "0", "A", path, start_s, end_s))


def refusal(path, match, **times):
    with pytest.raises(AudioError, match=match) as caught:
        load(path, **times)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)
    with pytest.raises(AudioError):
        sound_info(path)
    return str(caught.value)


@pytest.fixture(scope="module")
def originals():
    return {name: encode(name, speech(0.6, e.rates[0], e.channels), e.rates[0]) for name, e in CONTAINERS.items()}


CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.floats(0, 1), st.integers(1, 255)),
        st.tuples(st.just("set"), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.floats(0, 1)),
        st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=64)),
        st.tuples(st.just("repeat"), st.floats(0, 1), st.floats(0, 1)),
    ),
    min_size=1,
    max_size=4,
)


def changed(content, changes, at_header):
    """The content with changes; all within the first 200 bytes, or anywhere."""
    result = bytearray(content)
    for kind, where, what in changes:
        at = int(where * (min(len(result), 200) if at_header else len(result)))
        if kind == "flip" and at < len(result):
            result[at] ^= what
        elif kind == "set":
            result[at : at + len(what)] = what
        elif kind == "insert":
            result[at:at] = what
        elif kind == "cut":
            del result[at : at + int(what * len(result))]
        elif kind == "repeat":
            result[at:at] = result[at : at + int(what * len(result))]
    return bytes(result)


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(list(CONTAINERS)), changes=CHANGES, at_header=st.booleans(), part=st.booleans())
def test_a_damaged_file_is_a_waveform_or_an_audio_error(name, changes, at_header, part, originals, tmp_path_factory):
    path = tmp_path_factory.mktemp("damaged") / "sound"
    path.write_bytes(changed(originals[name], changes, at_header))
    message = None
    tracemalloc.start()
    try:
        duration_s = sound_info(path).duration_s
        expected = min(0.3, duration_s) - 0.1 if part else duration_s  # a file may be 0.1 s shorter than an utterance
        waveform = load(path, 0.1, 0.3) if part else load(path)
    except AudioError as error:
        message = str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    path.unlink()
    assert peak < 2**29  # an hour at 16 kHz, in pieces and joined
    if message is None:
        assert waveform.size == pytest.approx(expected * 16_000, abs=1)
        assert np.isfinite(waveform).all()
    else:
        assert message.startswith(f"{path}: ")
        assert "\n" not in message


W64 = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
WAVS = [kind + b"\xff\xff\xff\xffWAVE" for kind in (b"RIFF", b"RIFX", b"RF64")]
OTHERS = [b"FORM....AIFF", b"fLaC", b"OggS\0\2", b".snd", b"caff", b"NIST_1A\n   1024\n"]
MAGIC = [b"", *WAVS, W64, *OTHERS, b"ID3\4\0\0\0\0\1\0", b"\xff\xfb\x90\x64"]


@settings(deadline=None, max_examples=100)
@given(content=st.binary(min_size=1, max_size=400), magic=st.sampled_from(MAGIC))
def test_noise_after_a_magic_number_is_an_audio_error(content, magic, tmp_path_factory):
    path = tmp_path_factory.mktemp("noise") / "sound"
    path.write_bytes(magic + content)
    with pytest.raises(AudioError):
        load(path)


@pytest.mark.parametrize("extension", ["raw", "wav", "vox", "gsm", "mp3", "m4a", "", "RAW"])
def test_samples_without_a_header(extension, tmp_path):
    path = tmp_path / f"turn.{extension}"
    path.write_bytes((32767 * speech(1.0)).astype("<i2").tobytes())
    refusal(path, r"can not be read as audio.*convert it to WAV")


@pytest.mark.parametrize("name", ["VOC", "PAF", "IRCAM", "MAT4", "MAT5", "PVF", "SVX", "AVR"])
def test_formats_whose_length_can_not_be_checked_are_refused(name, tmp_path):
    soundfile.write(tmp_path / "sound", speech(1.0), 16_000, format=name)
    refusal(tmp_path / "sound", r"can not be read as audio.*convert it to WAV")


def wav_with(offset, value):
    content = encode("wav", speech(1.0), 16_000)
    return content[:offset] + value + content[offset + len(value) :]


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (24, bytes(4)),  # sampling rate
        (24, b"\1\0\0\0"),
        (24, b"\xff\xff\xff\x7f"),
        (24, b"\xff\xff\xff\xff"),
        (22, bytes(2)),  # channels
        (22, b"\xff\xff"),
        (34, bytes(2)),  # bits
        (34, b"\xff\xff"),
        (20, b"\x55\0"),  # MPEG within WAV
        (16, b"\xff\xff\xff\xff"),  # size of the format
    ],
)
def test_absurd_headers(offset, value, tmp_path):
    path = tmp_path / "absurd.wav"
    path.write_bytes(wav_with(offset, value))
    tracemalloc.start()
    refusal(path, ".")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_sizes_beyond_the_limits_of_file_systems(originals, tmp_path):
    path = tmp_path / "sound"
    far = b"\xff\xff\xff\xff\xff\xff\xff\x7f"
    for name in ("w64", "caf", "rf64", "aiff", "nist", "mp3", "flac"):
        for at in range(0, 120, 2):
            path.write_bytes(originals[name][:at] + far + originals[name][at + 8 :])
            try:
                assert load(path).size > 0
            except AudioError as error:
                assert error.args  # noqa: PT017


@pytest.mark.parametrize("kbps_code", [1, 2])
def test_mpeg_frames_that_are_smaller_than_their_side_information(kbps_code, tmp_path):
    path = tmp_path / "small.mp3"
    header = (0xFFE3_0000 | kbps_code << 12 | 1 << 10).to_bytes(4, "big")  # MPEG 2.5 at 12 kHz
    path.write_bytes((header + bytes(44 + 48 * (kbps_code - 1))) * 2 + header + bytes(3))
    refusal(path, ".")


def test_au_with_four_billion_channels_and_flac_with_2_36_samples(tmp_path):
    path = tmp_path / "sound"
    content = encode("au", speech(1.0), 16_000)
    path.write_bytes(content[:20] + b"\xff\xff\xff\xff" + content[24:])
    refusal(path, ".")
    path.write_bytes(flac_with_total(encode("flac", speech(1.0), 16_000), 2**36 - 1))
    refusal(path, "cut short")


def test_hundreds_of_channels_are_decoded_in_small_blocks(tmp_path):
    path = tmp_path / "many.wav"
    soundfile.write(path, np.tile(speech(1.0, 8_000), (1, 1000)), 8_000)
    tracemalloc.start()
    assert load(path).size == 16_000
    assert tracemalloc.get_traced_memory()[1] < 2**24  # all samples have 2**25
    tracemalloc.stop()


@linux
def test_pipes_devices_and_folders_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refusal(tmp_path / "pipe", "this is not a file; give the sound file itself")  # nobody will ever write to it
    for device in ("/dev/null", "/dev/zero"):
        refusal(type(tmp_path)(device), "this is not a file")
    refusal(tmp_path, "this is a folder")
    (tmp_path / "link").symlink_to(tmp_path / "link")
    refusal(tmp_path / "link", "can not be opened|no such file")
    refusal(tmp_path / "missing" / "x.wav", "there is no such file")
    refusal(tmp_path / ("x" * 300), "can not be opened|no such file")
    with pytest.raises(AudioError, match="no such file"):
        sound_info(type(tmp_path)(f"{tmp_path}/a\0b"))


@linux
def test_a_file_without_the_right_to_read_it(write_audio, monkeypatch):
    path = write_audio("secret.wav")
    if os.geteuid() != 0:
        path.chmod(0)
    else:  # root may read everything

        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(os, "open", refuse)
    refusal(path, r"can not be opened \(Permission denied\); check its rights")


@linux
def test_file_names_with_line_breaks_and_invalid_bytes(write_audio, tmp_path):
    for name in (
        "a\nb.wav",
        "a\tb\x1b[0m.wav",
        "\u202e.wav",
        os.fsdecode(b"\xff\xfe.wav"),
        " .wav",
        "é.wav",
        "%s{0}.wav",
    ):
        path = tmp_path / name
        write_audio("tone.wav").rename(path)
        assert load(path).size == 16_000
        path.write_bytes(b"?")
        message = refusal(path, "can not be read as audio")
        assert "\x1b" not in message


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "growing.wav"
    content = encode("wav", speech(4.0, 48_000, 2), 48_000)
    read = reader.Sound._read

    def rewritten(self, frames):
        block = read(self, frames)
        path.write_bytes(content[: len(content) // 2])
        return block

    for times in ({}, {"start_s": 2.0, "end_s": 3.0}):
        path.write_bytes(content)
        with monkeypatch.context() as patch:
            patch.setattr(reader.Sound, "_read", rewritten)
            with pytest.raises(AudioError, match=r"changed while it was read|damaged"):
                load(path, **times)
    path.write_bytes(content)
    assert load(path).size == 64_000


@linux
def test_a_file_that_vanishes_while_it_is_read_is_read(write_audio, monkeypatch):
    path = write_audio("tone.flac")
    read = reader.Sound._read
    monkeypatch.setattr(reader.Sound, "_read", lambda self, frames: path.unlink(missing_ok=True) or read(self, frames))
    assert load(path).size == 16_000
    refusal(path, "no such file")


def test_a_failing_disk_is_an_audio_error(write_audio, monkeypatch):
    path = write_audio("tone.wav", duration_s=10.0)
    original = reader.View.readinto

    def failing(self, buffer):
        if self.tell() > 100_000:
            self.error = OSError(5, "Input/output error")
            return 0
        return original(self, buffer)

    monkeypatch.setattr(reader.View, "readinto", failing)
    with pytest.raises(AudioError, match=r"can not be read \(Input/output error\)"):
        load(path)


def test_every_exception_of_load_audio_is_an_audio_error(tmp_path, monkeypatch):
    path = tmp_path / "turn.m4a"
    path.write_bytes(b"\0\0\0\x18ftypM4A ".ljust(500, b"\1"))
    refusal(path, "can not be read as audio.*convert it to WAV")
    monkeypatch.setattr(audio, "is_torchcodec_available", lambda: True)
    for error in (RuntimeError("no\ncodec."), TypeError("?"), ValueError(""), OSError(5, "I/O"), MemoryError()):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(audio, "load_audio", fail)
        with pytest.raises(AudioError) as caught:
            load(path)
        assert str(caught.value).startswith(f"{path}: the audio can not be decoded")
        assert "\n" not in str(caught.value)


def test_a_torchcodec_that_can_not_be_imported_is_a_missing_package(tmp_path, monkeypatch):
    path = tmp_path / "turn.m4a"
    path.write_bytes(b"\0\0\0\x18ftypM4A ".ljust(500, b"\1"))
    monkeypatch.setattr(audio, "is_torchcodec_available", lambda: True)

    def fail(*_, **__):
        raise ImportError("libavcodec.so.61:\nno such file")

    monkeypatch.setattr(audio, "load_audio", fail)
    with pytest.raises(MissingDependencyError, match="pip install torchcodec") as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_the_audio_of_load_audio_is_checked_and_cut_like_other_audio(tmp_path, monkeypatch):
    path = tmp_path / "turn.webm"
    path.write_bytes(b"\x1aE\xdf\xa3".ljust(500, b"\1"))
    monkeypatch.setattr(audio, "is_torchcodec_available", lambda: True)
    calls = []
    wave = speech(2.0)[:, 0]
    monkeypatch.setattr(audio, "load_audio", lambda *a, **k: calls.append(a) or wave)
    assert np.array_equal(load(path), wave)
    assert np.array_equal(load(path, 0.5, 1.0), wave[8_000:16_000])
    assert len(calls) == 1
    with pytest.raises(AudioError, match=r"the file lasts 2\.00 s"):
        load(path, 1.0, 3.0)
    path.write_bytes(b"\x1aE\xdf\xa3".ljust(600, b"\1"))
    wave = np.full(16_000, 0.1, dtype=np.float32)
    with pytest.raises(AudioError, match="silent"):
        load(path)


def test_no_file_stays_open(write_audio, tmp_path):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    good, bad = write_audio("good.flac"), tmp_path / "bad.flac"
    bad.write_bytes(good.read_bytes()[:3000])
    load(good)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        load(good)
        load(good, 0.1, 0.5)
        with pytest.raises(MalAdapterError):
            load(bad)
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_do_not_mix_up_their_errors(write_audio, tmp_path):
    """libsndfile keeps the last error of opening in one place for all threads."""
    good = write_audio("good.wav")
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"RIFF....WAVE" + bytes(100))
    wrong = []

    def run(path, fails):
        for _ in range(50):
            try:
                load(path)
                wrong.extend([path] if fails else [])
            except AudioError as error:
                wrong.extend([] if fails and str(path) in str(error) else [path])

    threads = [threading.Thread(target=run, args=(path, path == bad)) for path in (good, bad, good, bad)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_decoders_print_nothing(originals, tmp_path, capfd):
    path = tmp_path / "sound"
    for name, content in originals.items():
        for data in (content, content[: len(content) // 2], content + b"\x37" * 500, bytes(30) + content):
            path.write_bytes(data)
            try:
                load(path)
                load(path, 0.5)
            except AudioError:
                continue
            finally:
                assert capfd.readouterr().err == "", name


def test_a_bytes_object_is_not_a_path():
    with pytest.raises((AttributeError, TypeError)):
        sound_info(io.BytesIO(b"?"))
