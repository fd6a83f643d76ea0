"""Turns that are longer than the host accepts, in parts that it accepts."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from mal_adapter.errors import AudioError
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.recognizer.audio import load_waveform
from mal_adapter.ser.turns.turn import Turn

__all__ = ["split_turn"]

_WINDOW_S = 0.1  # a pause between words is about so long


def split_turn(turn: Turn, path: Path, max_s: float) -> Iterator[Turn]:
    """Split a turn at its quietest places.

    Args:
        turn: Of any length.
        path: The recording, of which only the parts are read in which a cut may be.
        max_s: The longest part, in seconds.

    Yields:
        The turn itself if it is not longer. Otherwise parts of between a quarter of `max_s` and `max_s`, without gaps.
        They have no words, since nobody knows which part has which.

    Example:
        >>> [part.duration_s for part in split_turn(Turn(0.0, 2.0), Path("call.wav"), max_s=30.0)]
        [2.0]
    """
    part = turn
    while part.duration_s > max_s:
        # The last two parts share what is left, so that none is a mere rest.
        earliest = min(max_s, part.duration_s / 2) / 2
        latest = min(max_s, part.duration_s - earliest)
        cut_s = _quietest(part, path, part.start_s + earliest, part.start_s + latest)
        yield replace(part, end_s=cut_s, text=None)
        part = replace(part, start_s=cut_s, text=None)
    yield part


def _quietest(turn: Turn, path: Path, from_s: float, to_s: float) -> float:
    """The middle of the quietest window of a part of a turn, in seconds."""
    rate = 16_000
    try:
        said = load_waveform(Utterance("-", "-", "-", path, from_s, to_s, channel=turn.channel), rate)
    except AudioError:  # silent, so that one place is as good as another; or broken, as the answer will say
        return (from_s + to_s) / 2
    window = round(_WINDOW_S * rate)
    if said.size <= window:
        return (from_s + to_s) / 2
    energy = np.concatenate(([0.0], np.cumsum(said.astype(np.float64) ** 2)))
    quietest = int(np.argmin(energy[window:] - energy[:-window]))
    return from_s + (quietest + window / 2) / rate
