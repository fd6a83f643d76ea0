"""Small sound files as the field sends them: made with soundfile, with a few bytes changed."""

import io
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import soundfile

__all__ = ["CONTAINERS", "Encoding", "encode", "flac_with_total", "ogg_pages", "speech", "with_size", "without_xing"]


class Encoding(NamedTuple):
    """One way to write a sound file.

    Attributes:
        format: soundfile's name.
        options: of `soundfile.write`.
        rates: sampling rates in Hz that it takes.
        channels: the most that it takes.
        error: how far a sample may be from the written one.
        extra_s: how much longer the file may be, since blocks are filled.
    """

    format: str
    options: dict[str, Any] = {}  # noqa: RUF012
    rates: tuple[int, ...] = (8_000, 11_025, 16_000, 22_050, 44_100, 48_000)
    channels: int = 2
    error: float = 1e-4
    extra_s: float = 0.0


_MP3 = (8_000, 16_000, 22_050, 44_100, 48_000)
CONTAINERS: dict[str, Encoding] = {
    "wav": Encoding("WAV"),
    "wav-8": Encoding("WAV", {"subtype": "PCM_U8"}, error=0.02),
    "wav-24": Encoding("WAV", {"subtype": "PCM_24"}),
    "wav-float": Encoding("WAV", {"subtype": "FLOAT"}),
    "wav-double": Encoding("WAV", {"subtype": "DOUBLE"}),
    "wav-ulaw": Encoding("WAV", {"subtype": "ULAW"}, error=0.03),
    "wav-alaw": Encoding("WAV", {"subtype": "ALAW"}, error=0.03),
    "wav-ima": Encoding("WAV", {"subtype": "IMA_ADPCM"}, error=0.2, extra_s=0.3),
    "wav-ms": Encoding("WAV", {"subtype": "MS_ADPCM"}, error=0.2, extra_s=0.3),
    "wav-gsm": Encoding("WAV", {"subtype": "GSM610"}, (8_000,), 1, 2.0, 0.3),
    "wav-g721": Encoding("WAV", {"subtype": "G721_32"}, (8_000,), 1, 0.2, 0.3),
    "rifx": Encoding("WAV", {"endian": "BIG"}),
    "wavex": Encoding("WAVEX"),
    "rf64": Encoding("RF64"),
    "w64": Encoding("W64"),
    "aiff": Encoding("AIFF"),
    "aiff-float": Encoding("AIFF", {"subtype": "FLOAT"}),
    "aifc-sowt": Encoding("AIFF", {"endian": "LITTLE"}),
    "au": Encoding("AU"),
    "au-ulaw": Encoding("AU", {"subtype": "ULAW"}, error=0.03),
    "caf": Encoding("CAF"),
    "caf-alac": Encoding("CAF", {"subtype": "ALAC_16"}),
    "nist": Encoding("NIST"),
    "flac": Encoding("FLAC"),
    "flac-24": Encoding("FLAC", {"subtype": "PCM_24"}),
    "mp3": Encoding("MP3", {}, _MP3, error=2.0),
    "mp3-vbr": Encoding("MP3", {"bitrate_mode": "VARIABLE", "compression_level": 0.2}, _MP3, error=2.0),
    "vorbis": Encoding("OGG", {"subtype": "VORBIS"}, error=2.0),
    "opus": Encoding("OGG", {"subtype": "OPUS"}, (8_000, 16_000, 48_000), error=2.0),
    "ogg-flac": Encoding("OGG", {"subtype": "FLAC"}) if "FLAC" in soundfile.available_subtypes("OGG") else None,
}  # fmt: skip
CONTAINERS = {name: encoding for name, encoding in CONTAINERS.items() if encoding is not None}


def speech(duration_s: float = 2.0, rate: int = 16_000, channels: int = 1, seed: int = 0) -> np.ndarray:
    """(samples, channels) float32: a chirp that never repeats, in syllables, with noise."""
    time_s = np.arange(round(duration_s * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.01, (time_s.size, channels))
    tone = 0.3 * np.sin(2 * np.pi * (150 + 20 * time_s) * time_s) * (0.6 + 0.4 * np.sin(9 * time_s))
    return (tone[:, np.newaxis] * np.linspace(1, 0.7, channels) + noise).astype(np.float32)


def encode(name: str, samples: np.ndarray, rate: int) -> bytes:
    """The bytes of a sound file, as one of CONTAINERS."""
    file = io.BytesIO()
    encoding = CONTAINERS[name]
    samples = samples if samples.ndim == 2 else samples[:, np.newaxis]
    with soundfile.SoundFile(file, "w", rate, samples.shape[1], format=encoding.format, **encoding.options) as writer:
        for start in range(0, len(samples), 1 << 14):  # libsndfile crashes on minutes of Vorbis at once
            writer.write(samples[start : start + (1 << 14)])
    return file.getvalue()


def with_size(content: bytes, chunk: bytes, size: int, layout: str = "<I") -> bytes:
    """The size after the first chunk of a name, replaced."""
    at = content.index(chunk) + len(chunk)
    value = struct.pack(layout, size)
    return content[:at] + value + content[at + len(value) :]


def flac_with_total(content: bytes, total: int) -> bytes:
    """A FLAC file's number of samples, replaced; 0 with the checksum's zeros, as in a pipe."""
    changed = bytearray(content)
    changed[21] = changed[21] & 0xF0 | total >> 32
    changed[22:26] = struct.pack(">I", total & 0xFFFF_FFFF)
    if total == 0:
        changed[26:42] = bytes(16)
    return bytes(changed)


def without_xing(content: bytes) -> bytes:
    """An MP3 file without its first frame, which has only the Xing header: as an encoder writes it to a pipe."""
    header = struct.unpack(">I", content[:4])[0]
    mpeg1, rate_code, padding = header >> 19 & 3 == 3, header >> 10 & 3, header >> 9 & 1
    table = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
    if not mpeg1:
        table = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
    rate = (44_100, 48_000, 32_000)[rate_code] >> {3: 0, 2: 1, 0: 2}[header >> 19 & 3]
    size = (144 if mpeg1 else 72) * table[header >> 12 & 15] * 1000 // rate + padding
    assert b"Xing" in content[:size] or b"Info" in content[:size]
    return content[size:]


def ogg_pages(content: bytes) -> list[bytes]:
    """The pages of an OGG file."""
    pages = []
    while content:
        segments = content[26]
        size = 27 + segments + sum(content[27 : 27 + segments])
        pages.append(content[:size])
        content = content[size:]
    return pages


def ogg_page(page: bytes, change: Callable[[bytearray], None]) -> bytes:
    """A page with something changed and its checksum put right."""
    changed = bytearray(page)
    change(changed)
    changed[22:26] = bytes(4)
    crc = 0
    for byte in changed:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ 0x04C1_1DB7 if crc & 0x8000_0000 else crc << 1) & 0xFFFF_FFFF
    changed[22:26] = struct.pack("<I", crc)
    return bytes(changed)
