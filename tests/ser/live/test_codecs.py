"""Samples from bytes: bit for bit those of soundfile and ffmpeg, wherever the messages are cut."""

import io
import shutil
import subprocess

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given
from hypothesis import strategies as st

from mal_adapter.errors import ConfigError
from mal_adapter.ser.live.codecs import Decoder, Resampler

SUBTYPES = {"mulaw": "ULAW", "alaw": "ALAW", "pcm16": "PCM_16"}
FFMPEG = {"mulaw": "mulaw", "alaw": "alaw", "pcm16": "s16le"}


@pytest.mark.parametrize("encoding", SUBTYPES)
def test_every_code_is_decoded_as_soundfile_does(encoding: str):
    data = bytes(range(256)) if encoding != "pcm16" else np.arange(-32768, 32768, dtype="<i2").tobytes()
    expected, _ = soundfile.read(
        io.BytesIO(data),
        dtype="float32",
        samplerate=8000,
        channels=1,
        format="RAW",
        subtype=SUBTYPES[encoding],
        endian="LITTLE",
    )
    decoded = Decoder(encoding)(data)
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded[:, 0], expected)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg")
@pytest.mark.parametrize("encoding", SUBTYPES)
def test_every_code_is_decoded_as_ffmpeg_does(encoding: str):
    data = bytes(range(256)) * 2
    command = ["ffmpeg", "-loglevel", "error", "-f", FFMPEG[encoding], "-ar", "8000", "-i", "-", "-f", "s16le", "-"]
    done = subprocess.run(command, input=data, capture_output=True, check=True)
    assert np.array_equal(Decoder(encoding)(data)[:, 0] * 32768, np.frombuffer(done.stdout, dtype="<i2"))


@given(
    st.sampled_from(sorted(SUBTYPES)),
    st.integers(1, 3),
    st.binary(max_size=60),
    st.lists(st.integers(0, 60), max_size=8),
)
def test_messages_may_be_cut_anywhere(encoding: str, channels: int, data: bytes, cuts: list[int]):
    whole = Decoder(encoding, channels)
    expected = whole(data)
    ends = [*sorted(cut for cut in cuts if cut < len(data)), len(data)]
    parts = Decoder(encoding, channels)
    decoded = [parts(data[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    assert np.array_equal(np.concatenate(decoded), expected)
    assert parts.left == whole.left
    assert expected.shape[1] == channels


@pytest.mark.parametrize("given", [8000, 11_025, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_resampling_does_not_depend_on_the_blocks(given: int, channels: int):
    rng = np.random.default_rng(given)
    sound = rng.normal(0, 0.1, (given, channels)).astype(np.float32)
    expected = soxr.resample(sound, given, 16_000).reshape(-1, channels)
    resampler, parts, place = Resampler(given, 16_000, channels), [], 0
    while place < len(sound):
        size = int(rng.integers(1, 2000))
        parts.append(resampler(sound[place : place + size]))
        place += size
    parts.append(resampler(sound[:0], last=True))
    assert np.array_equal(np.concatenate(parts), expected)


def test_an_equal_rate_changes_nothing():
    block = np.ones((5, 2), dtype=np.float32)
    assert Resampler(16_000, 16_000, 2)(block) is block


def test_an_unknown_encoding_is_refused():
    with pytest.raises(ConfigError, match="opus"):
        Decoder("opus")
    with pytest.raises(ConfigError, match="at least one channel"):
        Decoder("mulaw", 0)
