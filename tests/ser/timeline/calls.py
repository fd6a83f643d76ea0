"""Spoken calls with turns at known times, in voices that the demo's host knows."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from mal_adapter.demo.dialogues import make_dialogue
from mal_adapter.demo.voices import SAMPLING_RATE
from mal_adapter.ser.turns import Turn

__all__ = ["SPEAKERS", "Call", "made_call"]

SPEAKERS = ("customer", "agent")


class Call(NamedTuple):
    path: Path
    turns: list[Turn]
    samples: np.ndarray
    """(samples, channels) int16 at 16 kHz."""


def made_call(path: Path, *, seed: int = 7, turns: int = 6, channels: int = 1) -> Call:
    """Write a call with pauses between its turns; with two channels, each speaker has one."""
    rng = np.random.default_rng(seed)
    said, spoken, at = [], [], 8_000
    for turn in make_dialogue("test", seed, 0, turns=turns).turns:
        channel = turn.speaker if channels == 2 else None
        times = at / SAMPLING_RATE, (at + turn.pcm.size) / SAMPLING_RATE
        said.append(Turn(*times, SPEAKERS[turn.speaker], channel=channel, emotion=turn.emotion))
        spoken.append((at, turn.speaker if channels == 2 else 0, turn.pcm))
        at += turn.pcm.size + int(rng.integers(2_000, 16_000))
    samples = np.zeros((at, channels), np.int16)
    for start, channel, pcm in spoken:
        samples[start : start + pcm.size, channel] = pcm
    soundfile.write(path, samples, SAMPLING_RATE, subtype="PCM_16")
    return Call(path, said, samples)
