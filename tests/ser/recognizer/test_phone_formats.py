"""What browsers and phones record, made by FFmpeg's and SoX's own encoders: exact parts, and typed errors."""

import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_adapter.errors import AudioError, AudioFormatError, AudioTooLongError, MissingDependencyError
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.recognizer import audio
from mal_adapter.ser.recognizer.audio import load_waveform, sound_info
from mal_adapter.ser.recognizer.sound import ffmpeg, kept
from tests.ser.odd_sounds import speech

pytestmark = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
pytest.importorskip("av")

DURATION_S = 5.0
#: The options of FFmpeg for each file, its sampling rates, and by how many samples it is late.
FILES = {
    "chrome.webm": ("-c:a libopus -b:a 48k -f webm -live 1", (48_000,), 0),
    "edited.webm": ("-c:a libopus -b:a 64k", (48_000,), 0),
    "vorbis.mkv": ("-c:a libvorbis", (48_000, 22_050), 0),
    "pcm.mka": ("-c:a pcm_s16le", (44_100, 8_000), 0),
    "float.mka": ("-c:a pcm_f32le", (48_000,), 0),
    "lossless.m4a": ("-c:a alac", (44_100, 8_000), 0),
    "iphone.m4a": ("-c:a aac -b:a 96k -aac_pns 0", (48_000, 44_100, 16_000, 11_025, 8_000), 0),
    "safari.mp4": ("-c:a aac -aac_pns 0 -movflags frag_keyframe+empty_moov", (48_000,), 1_024),
    "android.3gp": ("-c:a aac -aac_pns 0 -ac 1", (16_000, 8_000), 0),
    "stream.aac": ("-c:a aac -aac_pns 0", (44_100, 8_000), 1_024),
    "old.wma": ("-c:a wmav2", (44_100,), -2_048),
}


def run(*command):
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


def sound(rate=48_000, duration_s=DURATION_S):
    """Two different channels."""
    first = speech(duration_s, rate, 1)
    return np.concatenate((first, 0.5 * np.roll(first, rate // 3)), axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name, rate) -> the path of a file, made once."""
    folder = tmp_path_factory.mktemp("phones")

    def make(name, rate, extra=()):
        path = folder / f"{rate}-{name}"
        if not path.exists():
            source = folder / f"{rate}.wav"
            soundfile.write(source, sound(rate), rate, subtype="FLOAT")
            run("ffmpeg", "-y", "-i", source, *extra, *FILES[name][0].split(), path)
        return path

    return make


@pytest.fixture(scope="module")
def telephone(tmp_path_factory):
    """An AMR file of a telephone, by SoX."""
    folder = tmp_path_factory.mktemp("amr")
    soundfile.write(folder / "call.wav", sound(8_000)[:, 0], 8_000)
    try:
        run("sox", folder / "call.wav", folder / "call.amr-nb")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("SoX does not write AMR here")
    return (folder / "call.amr-nb").rename(folder / "call.amr")


def load(path, start_s=None, end_s=None, sampling_rate=16_000, channel=None):
    return load_waveform(Utterance("d", "0", "A", path, start_s, end_s, channel=channel), sampling_rate)


def lag(found, wanted):
    """By how many samples the first is later."""
    size = 2 ** int(np.ceil(np.log2(len(found) + len(wanted))))
    common = np.fft.irfft(np.fft.rfft(found, size) * np.fft.rfft(wanted, size).conj())
    best = int(np.argmax(common))
    return best - size if best > size // 2 else best


@pytest.mark.parametrize(("name", "rate"), [(name, rate) for name, (_, rates, _) in FILES.items() for rate in rates])
def test_samples_are_those_that_were_recorded(made, name, rate, capfd):
    path = made(name, rate)
    info = sound_info(path)
    assert info.sampling_rate == rate
    assert info.channels == (1 if "-ac 1" in FILES[name][0] else 2)
    late = FILES[name][2]
    assert abs(info.duration_s - DURATION_S) <= (0.006 if late == 0 else 0.3)
    channels = [load(path, sampling_rate=info.sampling_rate, channel=channel) for channel in range(info.channels)]
    reference = subprocess.run(["ffmpeg", "-i", path, "-f", "f32le", "-"], capture_output=True, check=True).stdout
    decoded = np.frombuffer(reference, dtype="<f4").reshape(-1, info.channels)
    size = len(channels[0])
    assert 0 <= len(decoded) - size <= 2_048  # FFmpeg's command keeps what fills the last block of MP4 files
    np.testing.assert_allclose(np.stack(channels, axis=1), decoded[:size], atol=1e-4)
    for channel in range(info.channels):
        found = channels[channel]
        wanted = sound(rate).mean(axis=1) if info.channels == 1 else sound(rate)[:, channel]
        assert abs(lag(found, wanted) - late) <= 3
        both = [part - part.mean() for part in (found[max(late, 0) :], wanted[max(-late, 0) :])]
        size = min(map(len, both))
        assert np.corrcoef(both[0][:size], both[1][:size])[0, 1] > 0.95
    assert capfd.readouterr().err == ""


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_part_equals_the_same_part_of_the_whole(made, data):
    name = data.draw(st.sampled_from(sorted(FILES)))
    path = made(name, data.draw(st.sampled_from(FILES[name][1])))
    target = data.draw(st.sampled_from([8_000, 16_000, 44_100]))
    whole = load(path, sampling_rate=target)
    start_s = data.draw(st.floats(0, DURATION_S - 0.2))
    end_s = data.draw(st.none() | st.floats(start_s + 0.03, DURATION_S - 0.1))
    part = load(path, start_s, end_s, target)
    expected = whole[round(start_s * target) :][: part.size]
    assert part.size == (whole.size if end_s is None else round(end_s * target)) - round(start_s * target)
    assert np.abs(part - expected).max() < 1e-4


def test_opus_has_48_khz_whatever_was_recorded(made):
    path = made("edited.webm", 8_000)
    duration_s, rate, channels = sound_info(path)
    assert (rate, channels) == (48_000, 2)
    # FFmpeg 8 counts the encoder's delay at the rate that the header names, and is 5 ms late.
    assert abs(duration_s - DURATION_S) < 0.006
    wanted = soxr.resample(sound(8_000)[:, 0], 8_000, 48_000)
    assert abs(lag(load(path, sampling_rate=48_000, channel=0), wanted)) <= 0.006 * 48_000


def test_an_amr_file_of_a_telephone(telephone):
    whole = load(telephone, sampling_rate=8_000)
    assert sound_info(telephone) == (DURATION_S, 8_000, 1)
    assert abs(lag(whole, sound(8_000)[:, 0])) < 50
    for start_s in (0.0, 0.51, 2.3, 4.0):
        part = load(telephone, start_s, start_s + 0.7, 8_000)
        np.testing.assert_allclose(part, whole[round(start_s * 8_000) :][: part.size], atol=1e-4)


def test_the_sound_of_a_video_starts_when_a_player_has_it_start(tmp_path):
    soundfile.write(tmp_path / "sound.wav", sound(), 48_000)
    for name, codecs in (("video.mp4", ("aac", "mpeg4")), ("video.webm", ("libopus", "libvpx"))):
        path = tmp_path / name
        picture = ("-f", "lavfi", "-i", "testsrc=d=8:s=64x64:r=10")
        tracks = ("-map", "1:v", "-map", "0:a", "-c:a", codecs[0], "-c:v", codecs[1])
        run("ffmpeg", "-y", "-itsoffset", "1.5", "-i", tmp_path / "sound.wav", *picture, *tracks, path)
        found = load(path, sampling_rate=48_000)
        assert abs(lag(found, sound().mean(axis=1)) - 1.5 * 48_000) <= 1_100
        assert np.abs(found[: round(1.4 * 48_000)]).max() == 0
        assert abs(sound_info(path).duration_s - 6.5) < 0.05
        np.testing.assert_allclose(load(path, 4.0, 4.5, 48_000), found[192_000:216_000], atol=0.05)


def test_a_gap_in_a_recording_is_silent(made, tmp_path):
    """Packets that a browser lost, or a pause of the recorder."""
    import av

    path = tmp_path / "gap.webm"
    with av.open(str(made("edited.webm", 48_000))) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.pts is None or 2_000 <= packet.pts < 2_600:
                continue
            packet.stream = stream
            target.mux(packet)
    found, whole = (load(file, sampling_rate=48_000) for file in (path, made("edited.webm", 48_000)))
    assert abs(found.size - whole.size) <= 48
    assert np.abs(found[round(2.05 * 48_000) : round(2.55 * 48_000)]).max() < 1e-3
    after = slice(round(3.0 * 48_000), round(4.5 * 48_000))
    assert abs(lag(found[after], whole[after])) <= 48  # WebM's times are in milliseconds
    np.testing.assert_allclose(load(path, 3.2, 3.4, 48_000), found[round(3.2 * 48_000) :][:9_600], atol=1e-4)


def test_of_several_tracks_the_main_one_is_read(made, tmp_path):
    path = tmp_path / "tracks.mka"
    first, second = made("edited.webm", 48_000), made("edited.webm", 8_000)
    run(
        "ffmpeg", "-y", "-i", first, "-i", second, "-map", "0", "-map", "1", "-c", "copy", "-disposition:a:1", "0", path
    )
    np.testing.assert_array_equal(load(path), load(first))


def test_a_part_of_a_long_recording_costs_what_the_part_costs(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "_SETTLED_S", -1e9)
    soundfile.write(tmp_path / "long.wav", np.tile(sound(16_000)[:, :1], (120, 1)), 16_000)
    path = tmp_path / "long.webm"
    run("ffmpeg", "-y", "-i", tmp_path / "long.wav", "-c:a", "libopus", "-b:a", "16k", path)
    load(path, 1.0, 2.0)
    decoded = []
    samples = ffmpeg._samples
    monkeypatch.setattr(ffmpeg, "_samples", lambda frame: decoded.append(frame.samples) or samples(frame))
    for start_s in (0.0, 100.0, 590.0):
        decoded.clear()
        started = time.process_time()
        load(path, start_s, start_s + 1.0)
        assert sum(decoded) <= 4 * 48_000
        assert time.process_time() - started < 1.0


def cut(path, share, folder):
    short = folder / f"cut-{path.name}"
    content = path.read_bytes()
    short.write_bytes(content[: round(share * len(content))])
    return short


@pytest.mark.parametrize("name", ["edited.webm", "pcm.mka", "android.3gp", "iphone.m4a", "old.wma"])
def test_a_file_that_is_cut_short_is_not_read(made, tmp_path, name):
    path = made(name, FILES[name][1][-1])
    for share in (0.02, 0.5, 0.9):
        with pytest.raises(AudioError, match=r"cut short|damaged|is empty"):
            load(cut(path, share, tmp_path))
    # The index first, as for the web: then FFmpeg finds only that the samples end too early.
    if path.suffix in (".m4a", ".3gp"):
        web = tmp_path / f"web{path.suffix}"
        run("ffmpeg", "-y", "-i", path, "-c", "copy", "-movflags", "faststart", web)
        assert load(web).size == load(path).size
        with pytest.raises(AudioError, match=r"cut short: \d\.\d\d s of the 5\.00 s|damaged"):
            load(cut(web, 0.6, tmp_path))


@pytest.mark.parametrize("name", ["chrome.webm", "stream.aac"])
def test_a_stream_without_a_length_is_read_to_its_end(made, tmp_path, name):
    path = made(name, FILES[name][1][0])
    whole = load(path)
    short = load(cut(path, 0.6, tmp_path))
    assert 0.4 < short.size / whole.size < 0.8
    np.testing.assert_allclose(short[:-2_000], whole[: short.size - 2_000], atol=1e-5)


@pytest.mark.parametrize("name", ["iphone.m4a", "lossless.m4a", "stream.aac"])
def test_damage_is_an_error(made, tmp_path, name):
    content = bytearray(made(name, 44_100).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3_000] = bytes(np.random.default_rng(0).integers(0, 256, 3_000, dtype=np.uint8))
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(AudioError, match=f"{name}: the file is (damaged|cut short)"):
        load(path)


@pytest.mark.parametrize("name", ["iphone.m4a", "edited.webm", "old.wma"])
def test_any_damage_is_an_error_or_sound(made, tmp_path, name):
    content = made(name, FILES[name][1][0]).read_bytes()
    rng = np.random.default_rng(1)
    for number in range(25):
        broken = bytearray(content)
        for place in rng.integers(0, len(broken), rng.integers(1, 30)):
            broken[place] = rng.integers(256)
        path = tmp_path / f"{number}-{name}"
        path.write_bytes(broken[: rng.integers(1, len(broken) + 1)])
        try:
            waveform = load(path)
        except AudioError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            assert np.isfinite(waveform).all()


def test_a_video_without_sound(tmp_path):
    path = tmp_path / "silent.mp4"
    run("ffmpeg", "-y", "-f", "lavfi", "-i", "testsrc=d=1:s=64x64:r=10", "-c:v", "mpeg4", path)
    with pytest.raises(AudioError, match=r"silent\.mp4: the file has no audio track"):
        load(path)


def test_formats_that_open_other_files_are_not_read(made, tmp_path):
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXTINF:5,\n{made('stream.aac', 8_000)}\n#EXT-X-ENDLIST\n")
    with pytest.raises(AudioFormatError):
        load(playlist)
    joined = tmp_path / "joined.ffconcat"
    joined.write_text(f"ffconcat version 1.0\nfile '{made('stream.aac', 8_000)}'\n")
    with pytest.raises(AudioFormatError):
        load(joined)


def test_the_channels_of_a_recording(made):
    path = made("iphone.m4a", 48_000)
    both = [load(path, channel=channel) for channel in range(2)]
    np.testing.assert_allclose(load(path), np.mean(both, axis=0), atol=1e-6)
    assert not np.allclose(both[0], both[1], atol=0.05)
    with pytest.raises(AudioError, match="in channel 2, counted from 0, but the file has 2 channels"):
        load(path, channel=2)


def test_a_limit_stops_the_decoding(made):
    path = made("edited.webm", 8_000)
    assert sound_info(path, longest_s=5.5).duration_s == pytest.approx(DURATION_S, abs=0.01)
    with pytest.raises(AudioTooLongError, match=r"webm: the audio lasts .* 2\.00 s"):
        sound_info(path, longest_s=2.0)


def test_without_pyav_the_error_names_the_extra(made, monkeypatch):
    path = made("iphone.m4a", 8_000)
    monkeypatch.setattr(ffmpeg, "find_spec", lambda name: None)
    monkeypatch.setattr(audio, "find_spec", lambda name: None)
    with pytest.raises(AudioFormatError, match=r"m4a: this can not be read as audio .*'mal-adapter\[recordings\]'"):
        load(path)
    # torchcodec is tried as before, but gives no channels.
    monkeypatch.setattr(audio, "is_torchcodec_available", lambda: True)
    wave = sound(16_000)[:, 0].copy()
    monkeypatch.setattr(audio, "load_audio", lambda *a, **k: wave)
    assert np.array_equal(load(path), wave)
    with pytest.raises(MissingDependencyError, match=r"'mal-adapter\[recordings\]'"):
        load(path, channel=0)


def test_no_file_stays_open(made):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    path = made("edited.webm", 8_000)
    load(path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(10):
        load(path, 1.0, 2.0)
        with pytest.raises(AudioError):
            load(path, 1.0, 20.0)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
