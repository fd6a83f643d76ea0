"""Spoken calls, made on the spot: two voices of espeak-ng on two channels, with noise, overlap and crosstalk, and the
truth about who speaks when."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

__all__ = ["VOICES", "Call", "SpokenTurn", "have_voices", "make_call", "say", "share_found", "write_call"]

Samples = npt.NDArray[np.float32]

#: Pairs of voices that differ in sex, language and speed.
VOICES = (("en-us+m3", "en-gb+f2"), ("de+f4", "de+m1"), ("fr+m7", "es+f1"), ("en-gb-scotland+m5", "pl+f3"))
PHRASES = """
yes
no never
that is right
good morning how can I help you today
I have been waiting for an answer since last Tuesday
my number is four seven one nine two zero
could you please say that again a little slower
the parcel arrived broken and nobody picked up the phone
I understand that this is annoying and I am sorry
we can send you a new one by the end of this week
is there anything else that I can do for you
thank you very much for your patience and have a nice day
I would like to talk to somebody who can really decide
let me have a look at your contract in our system
it says here that the payment was received on the second of March
no I did not get any letter from you at all
""".strip().splitlines()
#: Speech is what is louder than this share of a phrase's peak.
_AUDIBLE = 10 ** (-40 / 20)


class SpokenTurn(NamedTuple):
    """One phrase of a call: from its first to its last audible sound."""

    start_s: float
    end_s: float
    channel: int


class Timed(Protocol):
    """A turn that was found."""

    @property
    def start_s(self) -> float: ...
    @property
    def end_s(self) -> float: ...
    @property
    def channel(self) -> int | None: ...


class Call(NamedTuple):
    """A call and its truth, in order of start."""

    samples: Samples  # (samples, 2)
    sampling_rate: int
    turns: tuple[SpokenTurn, ...]


def have_voices() -> bool:
    return shutil.which("espeak-ng") is not None


@lru_cache(maxsize=1024)
def say(phrase: str, voice: str, words_per_minute: int = 165, pitch: int = 50) -> Samples:
    """A phrase at 16 kHz, without the silence around it, with a root mean square of 0.1."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "phrase.wav"
        command = ["espeak-ng", "-v", voice, "-s", str(words_per_minute), "-p", str(pitch), "-w", str(path), phrase]
        subprocess.run(command, check=True, capture_output=True)
        samples, rate = soundfile.read(path, dtype="float32")
    samples = soxr.resample(samples, rate, 16_000)
    loud = np.flatnonzero(np.abs(samples) > _AUDIBLE * np.abs(samples).max())
    samples = samples[loud[0] : loud[-1] + 1]
    return np.asarray(0.1 * samples / np.sqrt(np.mean(samples**2)), dtype=np.float32)


def make_call(
    duration_s: float,
    seed: int = 0,
    *,
    sampling_rate: int = 8_000,
    voices: tuple[str, str] = VOICES[0],
    noise_db: float = -35.0,
    overlap: float = 0.15,
    crosstalk_db: float | None = 25.0,
    crosstalk_delay_s: float = 0.012,
    louder_db: float = 0.0,
    level_db: float = -20.0,
) -> Call:
    """Make a call of two speakers, one per channel.

    Args:
        duration_s: Of the whole call; the last turn ends within it.
        seed: Of who speaks, what, and the pauses.
        sampling_rate: Of the result, in Hz.
        voices: Of the first and the second channel, for espeak-ng.
        noise_db: Level of the noise below speech, in each channel.
        overlap: Share of changes of speaker where the next begins before the other ends.
        crosstalk_db: How much quieter each channel has the other's speech; None for none of it.
        crosstalk_delay_s: How much later.
        louder_db: How much louder the second speaker is.
        level_db: Of speech, below full scale.
    """
    rng = np.random.default_rng(seed)
    count = round(duration_s * 16_000)
    clean = np.zeros((count, 2), dtype=np.float32)
    turns: list[SpokenTurn] = []
    free = [0.5, 0.5]  # from when each channel may speak again
    last = 0.0
    channel = int(rng.integers(2))
    while True:
        phrase = say(
            PHRASES[int(rng.integers(len(PHRASES)))],
            voices[channel],
            int(rng.integers(140, 200, endpoint=True) // 20 * 20),
        )
        length_s = phrase.size / 16_000
        pause_s = float(-rng.uniform(0.3, 1.2) if turns and rng.random() < overlap else rng.uniform(0.25, 1.5))
        start_s = max(free[channel], last + pause_s)
        if start_s + length_s > duration_s - 0.5:
            break
        first = round(start_s * 16_000)
        gain = 10 ** ((level_db + 20 + rng.normal(0, 2) + (louder_db if channel else 0.0)) / 20)
        clean[first : first + phrase.size, channel] += np.float32(gain) * phrase
        turns.append(SpokenTurn(first / 16_000, first / 16_000 + length_s, channel))
        free[channel] = start_s + length_s + rng.uniform(0.6, 2.0)
        last = max(last, start_s + length_s)
        if rng.random() < 0.8:
            channel = 1 - channel
    heard = clean
    if crosstalk_db is not None:
        delay = round(crosstalk_delay_s * 16_000)
        copied = np.zeros_like(clean)
        copied[delay:] = clean[: count - delay, ::-1]
        # A wall and a handset pass few high tones.
        copied[1:] = 0.6 * copied[1:] + 0.4 * copied[:-1]
        heard = clean + np.float32(10 ** (-crosstalk_db / 20)) * copied
    noise = _noise(count, rng) * np.float32(10 ** ((level_db + noise_db) / 20))
    samples = soxr.resample(heard + noise, 16_000, sampling_rate)
    return Call(np.clip(samples, -1, 1).astype(np.float32), sampling_rate, tuple(sorted(turns)))


def _noise(count: int, rng: np.random.Generator) -> Samples:
    """Noise of two channels whose low tones are stronger, with mains hum; its root mean square is 1."""
    noise = np.empty((count, 2), dtype=np.float32)
    for channel in range(2):
        white = rng.standard_normal(count, dtype=np.float32)
        slow = np.convolve(white, np.full(8, 1 / 8, dtype=np.float32), mode="same")
        noise[:, channel] = 0.4 * white + slow + 0.2 * np.sin(np.arange(count) * (2 * np.pi * 50 / 16_000))
    return noise / np.sqrt(np.mean(noise**2, axis=0))


def write_call(path: Path, call: Call, subtype: str = "ULAW") -> Path:
    """Write the call as a WAV file of one of soundfile's subtypes."""
    soundfile.write(path, call.samples, call.sampling_rate, subtype=subtype)
    return path


def share_found(found: Iterable[Timed], truth: Sequence[SpokenTurn], tolerance_s: float = 0.2) -> float:
    """The share of spoken turns that a turn of their channel has, both of whose ends are within the tolerance."""
    turns = list(found)
    hits = sum(
        any(
            turn.channel == spoken.channel
            and abs(turn.start_s - spoken.start_s) <= tolerance_s
            and abs(turn.end_s - spoken.end_s) <= tolerance_s
            for turn in turns
        )
        for spoken in truth
    )
    return hits / len(truth)
