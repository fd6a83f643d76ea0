"""A sound file gives all samples that it holds, or an error that says what is missing."""

import struct

import numpy as np
import pytest
import soundfile

from mal_adapter.errors import AudioError, AudioTooLongError
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.recognizer import audio
from mal_adapter.ser.recognizer.audio import load_waveform, sound_info
from tests.ser.odd_sounds import (
    CONTAINERS,
    encode,
    flac_with_total,
    ogg_page,
    ogg_pages,
    speech,
    with_size,
    without_xing,
)

ID3V2 = b"ID3\x04\x00\x00\x00\x00\x02\x00" + bytes(256)
ID3V1 = b"TAG" + b"title".ljust(125, b"\0")
APE_FLAGS = (0xA000_0000, 0x8000_0000)  # of a header, and of a footer
APE = bytes(8).join(b"APETAGEX" + struct.pack("<IIIIQ", 2000, 40, 1, flags, 0) for flags in APE_FLAGS)


@pytest.fixture
def seconds(tmp_path):
    """seconds(content) -> how long the sound in these bytes is; decoded, and by the headers alone."""

    def of(content, **times):
        path = tmp_path / "sound"
        path.write_bytes(content)
        duration_s = load_waveform(Utterance("d", "0", "A", path, **times)).size / 16_000
        if not times:
            assert sound_info(path).duration_s == pytest.approx(duration_s, abs=1e-3)
        return duration_s

    return of


@pytest.mark.parametrize("name", CONTAINERS)
def test_each_container_is_read_whole_and_refused_when_it_was_cut_anywhere(name, seconds):
    encoding = CONTAINERS[name]
    rate = encoding.rates[0]
    content = encode(name, speech(3.0, rate, encoding.channels), rate)
    assert 0 <= seconds(content) - 3.0 <= encoding.extra_s
    for share in (0.02, 0.3, 0.5, 0.61, 0.9):
        with pytest.raises(AudioError, match=r"cut short|damaged|read as audio|header|is empty|decoded") as caught:
            seconds(content[: int(len(content) * share)])
        assert "; " in str(caught.value)
        with pytest.raises(AudioError):
            seconds(content[: int(len(content) * share)], end_s=0.1)


@pytest.mark.parametrize("name", ["wav", "wav-24", "wav-ulaw", "wav-ima", "wavex", "rifx"])
@pytest.mark.parametrize("size", [0, 0x7FFF_F000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFDB, 0xFFFF_FFFF])
def test_wav_from_a_pipe_is_read_to_its_end(name, size, seconds):
    content = with_size(encode(name, speech(1.5), 16_000), b"data", size, ">I" if name == "rifx" else "<I")
    assert abs(seconds(content) - 1.5) <= CONTAINERS[name].extra_s
    assert seconds(content, start_s=0.5, end_s=1.0) == 0.5


@pytest.mark.parametrize(
    ("name", "chunk", "skip", "layout", "sizes"),
    [
        ("aiff", b"SSND", 0, ">I", [0, 0xFFFF_FFFF, 0x7FFF_F008]),
        ("au", b".snd", 4, ">I", [0, 0xFFFF_FFFF]),
        ("caf", b"data", 0, ">q", [-1]),
        ("w64", b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0O\x8e\xdb\x8a", 0, "<q", [0, 24, 2**63 - 1, -1]),
        ("rf64", b"ds64\x1c\0\0\0", 8, "<q", [0, -1]),
    ],
)
def test_other_containers_from_a_pipe_are_read_to_their_end(name, chunk, skip, layout, sizes, seconds):
    whole = encode(name, speech(1.5), 16_000)
    at = whole.index(chunk)
    for size in sizes:
        content = whole[:at] + with_size(whole[at:], chunk + whole[at + len(chunk) :][:skip], size, layout)
        assert seconds(content) == 1.5


def test_aiff_whose_two_numbers_disagree(seconds):
    content = encode("aiff", speech(1.5), 16_000)
    at = content.index(b"COMM") + 10
    assert seconds(content[:at] + bytes(4) + content[at + 4 :]) == 1.5  # written to a pipe
    with pytest.raises(AudioError, match=r"1\.50 s of the 3\.00 s"):
        seconds(content[:at] + struct.pack(">I", 48_000) + content[at + 4 :])


@pytest.mark.parametrize("name", ["wav", "wav-8", "wav-float", "rf64", "w64", "aiff", "au", "nist"])
def test_a_header_that_was_written_too_early_is_refused(name, seconds):
    """A recorder that was switched off: its header has the size of an earlier moment."""
    whole, early = encode(name, speech(2.0), 16_000), encode(name, speech(1.0), 16_000)
    offset = early.index(speech_bytes(early, whole))
    with pytest.raises(AudioError, match=r"holds about 1\.0\d s more than the 1\.00 s"):
        seconds(early[:offset] + whole[offset:])


def speech_bytes(early, whole):
    """The longest common end of a file and part of another: its samples."""
    return next(early[start:] for start in range(len(early)) if early[start:] in whole)


def test_what_may_follow_the_samples_of_a_wav(seconds):
    content = encode("wav", speech(1.0), 16_000)
    extra = b"LIST" + struct.pack("<I", 20_000) + b"INFO".ljust(20_000, b" ")
    for tail in (extra, b"\0", bytes(9000), ID3V1, ID3V1 + bytes(3), b"id3 " + struct.pack("<I", 4000) + bytes(4000)):
        assert seconds(content + tail) == 1.0
    with pytest.raises(AudioError, match="more than one data chunk"):
        seconds(content + content[content.index(b"data") :])


@pytest.mark.parametrize("frames", [1, 999, 1001, 16_001])
def test_odd_sizes_with_and_without_padding(frames, seconds):
    content = encode("wav-8", speech(2.0)[:frames], 16_000)
    extra = b"LIST" + struct.pack("<I", 9000) + b"INFO".ljust(9000, b" ")
    unpadded = content[: content.index(b"data") + 8 + frames]
    for changed in (content, unpadded, content + extra, unpadded + extra):
        if frames == 1:
            with pytest.raises(AudioError, match="silent"):
                seconds(changed)
        else:
            assert round(seconds(changed) * 16_000) == frames


def test_an_empty_wav_with_other_chunks_is_empty(seconds):
    content = encode("wav", np.zeros((0, 1), dtype=np.float32), 16_000)
    for tail in (b"", b"LIST" + struct.pack("<I", 4) + b"INFO"):
        with pytest.raises(AudioError, match="is empty"):
            seconds(content + tail)


@pytest.mark.parametrize("total", [0, 1, 16_000, 31_999, 32_001, 33_000])
@pytest.mark.parametrize("name", ["flac", "flac-24"])
def test_flac_is_read_to_its_last_frame_whatever_its_header_says(name, total, seconds):
    content = flac_with_total(encode(name, speech(2.0, channels=2), 16_000), total)
    assert seconds(content) == 2.0
    assert seconds(content, start_s=1.0, end_s=1.75) == 0.75


def test_flac_with_more_in_its_header_than_in_its_frames_is_cut_short(seconds):
    content = encode("flac", speech(2.0), 16_000)
    with pytest.raises(AudioError, match=r"2\.00 s of the 5\.00 s"):
        seconds(flac_with_total(content, 80_000))
    for size in range(len(content) * 2 // 3, len(content), 997):
        with pytest.raises(AudioError, match=r"cut short|decoded|damaged"):
            seconds(flac_with_total(content[:size], 0))


def test_tags_before_and_after(seconds):
    for name in ("flac", "mp3", "mp3-vbr"):
        content = encode(name, speech(2.0), 16_000)
        for tail in (ID3V1, APE, APE + ID3V1, bytes(5000)):
            assert seconds(ID3V2 + content + tail) == seconds(content) == 2.0, name
    assert seconds(encode("vorbis", speech(2.0), 16_000) + ID3V1) == 2.0


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("name", ["mp3", "mp3-vbr"])
def test_mp3_without_a_xing_header(name, rate, seconds):
    samples = speech(6.0, rate, 2)
    samples[: len(samples) // 2] *= 0.001  # so that the first frame's bit rate says nothing
    content = without_xing(encode(name, samples, rate))
    assert 0 <= seconds(content) - 6.0 < 0.2  # with the encoder's delay
    assert 0 <= seconds(ID3V2 + content + ID3V1) - 6.0 < 0.2
    assert seconds(content, start_s=5.0, end_s=5.75) == 0.75
    with pytest.raises(AudioError, match="ends within a frame"):
        seconds(content[:-50])


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.9, 1.1, 2.0])
def test_mp3_with_a_wrong_xing_header(factor, seconds):
    content = encode("mp3-vbr", speech(3.0), 16_000)
    at = next(content.index(tag) for tag in (b"Xing", b"Info") if tag in content) + 8
    (frames,) = struct.unpack(">I", content[at : at + 4])
    changed = content[:at] + struct.pack(">I", int(frames * factor)) + content[at + 4 :]
    if factor > 1:
        with pytest.raises(AudioError, match="cut short"):
            seconds(changed)
    else:
        assert seconds(changed) == 3.0


def test_mp3_whose_xing_header_has_no_number_of_frames(seconds):
    content = encode("mp3-vbr", speech(3.0), 16_000)
    at = next(content.index(tag) for tag in (b"Xing", b"Info") if tag in content) + 4
    assert 0 <= seconds(content[:at] + bytes(4) + content[at + 4 :]) - 3.0 < 0.2


@pytest.mark.parametrize("name", ["vorbis", "opus"])
def test_ogg_whose_positions_do_not_begin_at_zero(name, seconds):
    """As of a broadcast that was joined late."""

    def shift(page):
        (position,) = struct.unpack("<q", page[6:14])
        page[6:14] = struct.pack("<q", position + 11_968 if position > 0 else position)

    content = b"".join(ogg_page(page, shift) for page in ogg_pages(encode(name, speech(6.0), 16_000)))
    assert seconds(content) == 6.0
    assert seconds(content, start_s=3.0, end_s=4.0) == 1.0


def test_mp3_files_that_were_joined(seconds):
    first, second = (encode("mp3", speech(duration_s), 16_000) for duration_s in (2.0, 1.0))
    assert seconds(first + second) == pytest.approx(3.0, abs=0.2)
    assert seconds(first + ID3V2 + second) == pytest.approx(3.0, abs=0.2)
    assert seconds(without_xing(first) + without_xing(second)) == pytest.approx(3.0, abs=0.3)


def test_mp3_with_other_bytes_between_its_frames(seconds):
    content = without_xing(encode("mp3", speech(2.0), 16_000))
    middle = len(content) // 2
    for changed in (content[:middle] + bytes(3000) + content[middle:], content[:middle] + content[middle + 100 :]):
        with pytest.raises(AudioError, match="are no MP3 frame, but frames follow"):
            seconds(changed)


@pytest.mark.parametrize("name", [name for name in ("vorbis", "opus", "ogg-flac") if name in CONTAINERS])
def test_ogg_without_some_of_its_pages(name, seconds):
    pages = ogg_pages(encode(name, speech(8.0), 16_000))
    assert len(pages) >= 4
    assert seconds(b"".join(pages)) == 8.0
    for end in range(1, len(pages)):
        with pytest.raises(AudioError, match="its last OGG page is missing"):
            seconds(b"".join(pages[:end]))
    with pytest.raises(AudioError, match=r"pages before byte .* are missing"):
        seconds(b"".join(pages[:-2] + pages[-1:]))
    unended = [*pages[:-1], ogg_page(pages[-1], lambda page: page.__setitem__(5, page[5] & ~4))]
    with pytest.raises(AudioError, match="its last OGG page is missing"):
        seconds(b"".join(unended))
    damaged = bytearray(b"".join(pages))
    damaged[len(damaged) - 40] ^= 1
    with pytest.raises(AudioError, match="wrong checksum"):
        seconds(bytes(damaged))


def test_chained_ogg_is_refused_since_only_its_first_stream_would_be_read(seconds):
    first = encode("vorbis", speech(1.0), 16_000)
    for second in (first, encode("opus", speech(1.0), 16_000)):
        with pytest.raises(AudioError, match="more than one OGG stream"):
            seconds(first + second)


def test_few_bytes_that_unpack_to_hours_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    read: list[int] = []
    original = soundfile.SoundFile.buffer_read_into
    monkeypatch.setattr(
        soundfile.SoundFile,
        "buffer_read_into",
        lambda self, out, dtype: read.append(len(out)) or original(self, out, dtype),
    )
    path = tmp_path / "hours.flac"
    with soundfile.SoundFile(path, "w", 8_000, 1, format="FLAC") as file:
        for _ in range(65):
            file.write(np.zeros(60 * 8_000, dtype=np.int16))
    assert path.stat().st_size < 2**18
    for total in (65 * 60 * 8_000, 0, 8_000):  # as declared, unknown, and much less
        path.write_bytes(flac_with_total(path.read_bytes(), total))
        with pytest.raises(
            AudioTooLongError, match=r"lasts 3900\.00 s, and an utterance at most 3600 s; give its start_s"
        ):
            load_waveform(Utterance("d", "0", "A", path))
        assert sound_info(path).duration_s == 3900
    assert read == []
    monkeypatch.setattr(audio, "LONGEST_S", 1.0)
    with pytest.raises(AudioTooLongError):
        load_waveform(Utterance("d", "0", "A", path, start_s=2.0, end_s=3.5))
