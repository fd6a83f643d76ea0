"""The turns of a recording, by voice activity."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mal_adapter.errors import ConfigError, TurnError
from mal_adapter.ser.paths import existing_sound
from mal_adapter.ser.recognizer.audio import sound_info
from mal_adapter.ser.turns.blocks import recording_blocks
from mal_adapter.ser.turns.detector import SpeechDetector
from mal_adapter.ser.turns.shaping import TurnShaper
from mal_adapter.ser.turns.turn import Turn, TurnSettings
from mal_adapter.ser.turns.voice import RATES

__all__ = ["find_turns"]


def find_turns(
    path: str | os.PathLike[str],
    channels: Sequence[str] | None = None,
    settings: TurnSettings | None = None,
    max_s: float | None = None,
) -> Iterator[Turn]:
    """Find who speaks when in a recording, by voice activity.

    The recording is read in blocks while the turns are taken, so hours of sound need no more memory than minutes.

    Args:
        path: A sound file of any length.
        channels: The speaker of each channel, for recordings with one speaker per channel. What a channel has only as
            a quieter copy of another one is not taken for speech. None averages the channels, and the speaker of each
            turn is "?".
        settings: How voice activity becomes turns.
        max_s: The longest turn in seconds, if that is less than the settings' `max_s`: what the host accepts.

    Returns:
        The turns in order of start, as they are found.

    Raises:
        TurnError: The names do not fit the number of channels, two are the same, or all channels have the same sound.
        ConfigError: `max_s` is too small.
        AudioError: The file can't be read; damage in its middle is found only when that is reached. Also, if channels
            are averaged, that they cancel.
        MissingDependencyError: silero-vad is not installed.

    Example:
        >>> import numpy as np, soundfile, tempfile
        >>> path = Path(tempfile.mkdtemp()) / "call.wav"
        >>> soundfile.write(path, np.random.default_rng(0).normal(0, 0.01, (24_000, 2)), 8_000)
        >>> list(find_turns(path, channels=["customer", "agent"]))  # noise is no speech
        []
        >>> find_turns(path, channels=["customer"])
        Traceback (most recent call last):
        mal_adapter.errors.TurnError: ...call.wav has 2 channels, and 1 name is given: customer; give one name ...
    """
    settings = _limited(settings or TurnSettings(), max_s)
    path = existing_sound(Path(path))
    info = sound_info(path)
    if channels is not None:
        _check_names(path, channels, info.channels)
    speakers = ["?"] if channels is None else list(channels)
    # Low rates have nothing more to say at 16 kHz; higher ones are found more exactly there.
    rate = RATES[0] if info.sampling_rate < RATES[1] else RATES[1]
    detector = SpeechDetector(rate, len(speakers), settings)
    shaper = TurnShaper(speakers, settings, mixed=channels is None)
    return _turns(path, detector, shaper, mixed=channels is None)


def _turns(path: Path, detector: SpeechDetector, shaper: TurnShaper, mixed: bool) -> Iterator[Turn]:
    alike = not mixed and detector.channels > 1
    for block in recording_blocks(path, detector.sampling_rate, mixed=mixed):
        speech = detector.feed(block)
        alike = alike and bool((block == block[:, :1]).all())
        if alike and speech:
            raise TurnError(
                f"all channels of {path} have the same sound, so they do not tell the speakers apart; give no names"
            )
        yield from shaper.add(speech, detector.settled_s)
    shaper.add(detector.finish(), 0.0)
    yield from shaper.finish(detector.position_s)


def _limited(settings: TurnSettings, max_s: float | None) -> TurnSettings:
    limits = [limit for limit in (settings.max_s, max_s) if limit is not None]
    return replace(settings, max_s=min(limits)) if limits else settings


def _check_names(path: Path, channels: Sequence[str], count: int) -> None:
    if isinstance(channels, str):
        raise ConfigError(f"channels must be a list of names, got the string {channels!r}")
    if len(channels) != count:
        have = "1 channel" if count == 1 else f"{count} channels"
        given = f"1 name is given: {channels[0]}" if len(channels) == 1 else f"{len(channels)} names are given"
        if len(channels) > 1:
            given += f": {', '.join(map(str, channels))}"
        raise TurnError(f"{path} has {have}, and {given}; give one name per channel, or none to average the channels")
    for name in channels:
        if not isinstance(name, str) or not name.strip():
            raise TurnError(f"a channel's speaker needs a name, got {name!r}")
    if len(set(channels)) < len(channels):
        raise TurnError(f"each channel needs its own name, got {', '.join(channels)}")
