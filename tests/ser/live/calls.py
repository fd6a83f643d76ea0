"""Spoken calls whose truth is known, made on the spot by espeak-ng."""

import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import soxr

Samples = npt.NDArray[np.float32]

SENTENCES = (
    "Good morning, how can I help you?",
    "My order has not arrived yet.",
    "I am sorry to hear that, let me look.",
    "This is the third time that it happens.",
    "It will be with you tomorrow.",
    "Thank you, that is very kind of you.",
)
VOICES = ("en-us+f3", "en+m3")


class Said(NamedTuple):
    """What is true of a turn; the times are those of the voice itself."""

    start_s: float
    end_s: float
    channel: int


@cache
def sentence(text: str, voice: str, rate: int) -> Samples:
    """A sentence without the silence around it."""
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "said.wav"
        subprocess.run(["espeak-ng", "-v", voice, "-s", "170", "-w", str(path), text], check=True)
        samples, given = soundfile.read(path, dtype="float32")
    samples = np.asarray(soxr.resample(samples, given, rate), dtype=np.float32)
    loud = np.flatnonzero(np.abs(samples) > 0.01)
    return samples[loud[0] : loud[-1] + 1]


def make_call(
    rate: int = 8_000, turns: int = 6, pause_s: float = 0.9, seed: int = 0, channels: int = 2
) -> tuple[Samples, list[Said]]:
    """(frames, channels) of two people who take turns, with a little noise, and the truth."""
    rng = np.random.default_rng(seed)
    parts, said, place = [], [], round(0.5 * rate)
    for number in range(turns):
        chosen = (number + seed) % len(SENTENCES)
        who = number % channels
        voice = sentence(SENTENCES[chosen], VOICES[number % 2], rate)
        parts.append((place, who, voice))
        said.append(Said(place / rate, (place + voice.size) / rate, who))
        place += voice.size + round((pause_s + rng.uniform(0, 0.4)) * rate)
    call = rng.normal(0, 0.0005, (place, channels)).astype(np.float32)
    for start, who, voice in parts:
        call[start : start + voice.size, who] += 0.6 * voice
    return call, said


def mulaw(samples: Samples) -> bytes:
    """(frames,) as G.711 µ-law, by libsndfile."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "said.raw"
        soundfile.write(path, samples, 8_000, format="RAW", subtype="ULAW", endian="FILE")
        return path.read_bytes()
