"""Parametric voices: a speaker's private baseline, an emotion as a shift from it, and a source-filter synthesiser.

An utterance alone is ambiguous by construction: a high, loud voice may be a happy low-pitched speaker or a neutral
high-pitched one. Only the vocal tract (the formant scale) is untouched by emotion, so it identifies the speaker.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

__all__ = [
    "EMOTION_SHIFTS",
    "SAMPLING_RATE",
    "TRACT_RANGE",
    "UTTERANCE_S",
    "VOWELS",
    "Speaker",
    "Speech",
    "draw_speaker",
    "draw_speech",
    "quantise",
    "synthesise",
]

SAMPLING_RATE = 16_000  # Hz
UTTERANCE_S = 1.45  # seconds; one length for all utterances keeps every sequence of the benchmark equally long

#: emotion -> (shift of the natural log of the pitch, shift of the level in dB)
EMOTION_SHIFTS: dict[str, tuple[float, float]] = {
    "neutral": (0.0, 0.0),
    "happy": (0.38, 2.0),
    "angry": (0.20, 9.0),
    "sad": (-0.30, -7.0),
}

# How much one speaker varies between two utterances of the same emotion.
PITCH_NOISE = 0.06  # standard deviation of the log pitch
LOUDNESS_NOISE_DB = 1.5

# Baseline ranges. Levels are wide (±10 dB) so that a level alone says little about the emotion: the best reader of one
# utterance's true pitch and level has an accuracy of 61 %, and 99 % once it knows the baselines.
PITCH_RANGE_HZ = (140.0, 420.0)
LOUDNESS_RANGE_DB = (-46.0, -26.0)  # dBFS (RMS); the loudest angry voice stays under full scale
TRACT_RANGE = (0.78, 1.28)  # factor on all formant frequencies; small tracts have high formants

# Formant frequencies in Hz at tract scale 1 (after Peterson and Barney's averages), bandwidths in Hz.
FORMANTS_HZ: dict[str, tuple[float, float, float, float]] = {
    "a": (750.0, 1250.0, 2550.0, 3600.0),
    "e": (500.0, 1900.0, 2600.0, 3600.0),
    "i": (300.0, 2250.0, 3000.0, 3700.0),
    "o": (480.0, 900.0, 2500.0, 3500.0),
    "u": (330.0, 1150.0, 2350.0, 3500.0),
}
BANDWIDTHS_HZ = (80.0, 100.0, 140.0, 200.0)
VOWELS: tuple[str, ...] = tuple(FORMANTS_HZ)
VOWELS_PER_UTTERANCE = 5

_SOURCE_CUTOFF_HZ = 2_500.0  # the glottal source falls off as exp(-(f / cutoff)² / 2)
_FADE = 320  # samples (20 ms) of cross-fade between vowels


@dataclass(frozen=True)
class Speaker:
    """A voice's private baseline: pitch (Hz), level (dBFS, RMS) and the factor on its formant frequencies."""

    pitch_hz: float
    loudness_db: float
    tract: float


@dataclass(frozen=True)
class Speech:
    """The true values that one utterance is made from; a listener has to estimate them from the audio."""

    pitch_hz: float
    loudness_db: float
    tract: float
    vowels: str


def draw_speaker(rng: np.random.Generator) -> Speaker:
    """Draw a speaker's baseline: pitch and tract log-uniform, level uniform in dB, all independent.

    Example:
        >>> draw_speaker(np.random.default_rng(0)) == draw_speaker(np.random.default_rng(0))
        True
    """
    low, high = np.log(PITCH_RANGE_HZ)
    small, large = np.log(TRACT_RANGE)
    return Speaker(
        pitch_hz=float(np.exp(rng.uniform(low, high))),
        loudness_db=float(rng.uniform(*LOUDNESS_RANGE_DB)),
        tract=float(np.exp(rng.uniform(small, large))),
    )


def draw_speech(speaker: Speaker, emotion: str, rng: np.random.Generator) -> Speech:
    """Draw one utterance of `speaker` with `emotion`: shifted baseline, a little noise, random vowels.

    Args:
        speaker: The baseline.
        emotion: One of `EMOTION_SHIFTS`.
        rng: Draws noise and vowels.

    Example:
        >>> speech = draw_speech(Speaker(200.0, -36.0, 1.0), "angry", np.random.default_rng(0))
        >>> speech.loudness_db > -36.0, speech.tract, len(speech.vowels)
        (True, 1.0, 5)
    """
    log_pitch, level_db = EMOTION_SHIFTS[emotion]
    return Speech(
        pitch_hz=float(speaker.pitch_hz * np.exp(log_pitch + PITCH_NOISE * rng.standard_normal())),
        loudness_db=float(speaker.loudness_db + level_db + LOUDNESS_NOISE_DB * rng.standard_normal()),
        tract=speaker.tract,
        vowels="".join(rng.choice(list(VOWELS), size=VOWELS_PER_UTTERANCE)),
    )


def synthesise(speech: Speech, rng: np.random.Generator, duration_s: float = UTTERANCE_S) -> NDArray[np.float32]:
    """Synthesise `speech.vowels` once: pulses with vibrato and jitter through the formants of a scaled vocal tract.

    Args:
        speech: Pitch (Hz, geometric mean over the utterance), level (dBFS, RMS of the whole utterance), tract, vowels.
        rng: Draws vibrato, jitter, breath noise and vowel lengths.
        duration_s: Length in seconds.

    Returns:
        float32 samples at 16 kHz, shape (round(duration_s * 16000),), clipped to [-1, 1).

    Example:
        >>> synthesise(Speech(220.0, -30.0, 1.0, "aeiou"), np.random.default_rng(0)).shape
        (23200,)
    """
    samples = round(duration_s * SAMPLING_RATE)
    source = _pulses(speech.pitch_hz, samples, rng)
    source += 0.02 * rng.standard_normal(samples, dtype=np.float32)
    voice = _vowel_sequence(source, speech.vowels, speech.tract, rng)
    fade = np.sin(np.linspace(0.0, np.pi / 2, 2 * _FADE, dtype=np.float32)) ** 2
    voice[: 2 * _FADE] *= fade
    voice[-2 * _FADE :] *= fade[::-1]
    voice *= 10.0 ** (speech.loudness_db / 20.0) / max(float(np.sqrt(np.mean(voice**2))), 1e-9)
    return np.clip(voice, -1.0, 1.0 - 2.0**-15).astype(np.float32)


def quantise(audio: NDArray[np.float32]) -> NDArray[np.int16]:
    """Convert to the 16-bit samples of a WAV file. Divided by 32768, they are exactly what reading that file returns.

    Example:
        >>> quantise(np.array([-1.0, 0.0, 0.5], dtype=np.float32)).tolist()
        [-32768, 0, 16384]
    """
    pcm: NDArray[np.int16] = np.clip(np.rint(audio * 32768.0), -32768, 32767).astype(np.int16)
    return pcm


def _pulses(pitch_hz: float, samples: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """A glottal pulse train (samples,) with zero mean and a fixed spectral envelope in Hz, whatever the pitch.

    exp(k (cos phase - 1)) has harmonics exp(-n² / 2k) to a good approximation; k = (cutoff / pitch)² makes that
    exp(-(f / cutoff)² / 2), far below aliasing at 8 kHz, for one cosine and one exponential per sample.
    """
    time_s = np.arange(samples, dtype=np.float32) / SAMPLING_RATE
    knots = 12  # jitter: a new random pitch about every 120 ms, interpolated linearly
    jitter = np.interp(np.linspace(0, knots - 1, samples), np.arange(knots), 0.02 * rng.standard_normal(knots))
    vibrato = rng.uniform(0.005, 0.02) * np.sin(2 * np.pi * (rng.uniform(4.0, 7.0) * time_s + rng.uniform()))
    contour = jitter + vibrato + rng.uniform(-0.05, 0.05) * np.linspace(-1, 1, samples)
    contour -= contour.mean()  # keeps the geometric mean at pitch_hz
    phase = np.cumsum(2 * np.pi * pitch_hz / SAMPLING_RATE * np.exp(contour)) + 2 * np.pi * rng.uniform()
    sharpness = (_SOURCE_CUTOFF_HZ / pitch_hz) ** 2
    pulses = np.exp(sharpness * (np.cos(phase).astype(np.float32) - 1.0))
    pulses -= pulses.mean()
    source: NDArray[np.float32] = (pulses / np.sqrt(np.mean(pulses**2))).astype(np.float32)
    return source


def _vowel_sequence(
    source: NDArray[np.float32], vowels: str, tract: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Filter the source (samples,) with the formants of one vowel after the other, cross-faded over 20 ms."""
    samples = len(source)
    lengths = rng.uniform(0.75, 1.25, size=len(vowels))
    edges = np.concatenate([[0], np.round(np.cumsum(lengths) / lengths.sum() * samples)]).astype(int)
    ramp = np.linspace(0.0, 1.0, 2 * _FADE, dtype=np.float32)
    voice = np.zeros(samples, dtype=np.float32)
    for index, vowel in enumerate(vowels):
        start, stop = max(0, edges[index] - _FADE), min(samples, edges[index + 1] + _FADE)
        piece = lfilter([1.0], _all_pole(vowel, tract), source[start:stop])
        piece /= np.sqrt(np.mean(piece**2)) + 1e-9  # all vowels at one level, since the level depends on the emotion
        if index > 0:
            piece[: 2 * _FADE] *= ramp
        if index < len(vowels) - 1:
            piece[-2 * _FADE :] *= ramp[::-1]
        voice[start:stop] += piece.astype(np.float32)
    return voice


def _all_pole(vowel: str, tract: float) -> NDArray[np.float64]:
    """Denominator of a cascade of four resonances, one per formant: shape (9,)."""
    poles: NDArray[np.float64] = np.ones(1)
    for formant_hz, bandwidth_hz in zip(FORMANTS_HZ[vowel], BANDWIDTHS_HZ, strict=True):
        radius = np.exp(-np.pi * bandwidth_hz / SAMPLING_RATE)
        angle = 2 * np.pi * formant_hz * tract / SAMPLING_RATE
        poles = np.convolve(poles, [1.0, -2 * radius * np.cos(angle), radius**2])
    return poles
