"""`Turn`: a part of a recording that one person speaks. `TurnSettings`: how turns are found."""

import math
from dataclasses import dataclass

from mal_adapter.errors import ConfigError, TurnError

__all__ = ["Turn", "TurnSettings"]


@dataclass(frozen=True, order=True)
class Turn:
    """A part of a recording that one person speaks. Turns sort by start, then by end.

    Args:
        start_s: In seconds from the start of the recording.
        end_s: In seconds, greater than the start.
        speaker: The speaker's name; "?" if nobody knows it.
        channel: The channel that has the speaker, from 0; None is the mean of all channels.
        text: The words, if known.
        emotion: The true label, if known.
        overlaps: Whether another person speaks during a part of it.

    Raises:
        TurnError: The times are not finite, negative or in the wrong order, or the channel is no channel.

    Example:
        >>> sorted([Turn(2.0, 3.5, "agent", channel=1), Turn(0.5, 1.5, "customer", channel=0)])[0].speaker
        'customer'
        >>> Turn(2.0, 1.0, "agent")
        Traceback (most recent call last):
        mal_adapter.errors.TurnError: a turn of 'agent' must end after it starts, got 2.0 s to 1.0 s
    """

    start_s: float
    end_s: float
    speaker: str = "?"
    channel: int | None = None
    text: str | None = None
    emotion: str | None = None
    overlaps: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start_s) and math.isfinite(self.end_s)) or self.start_s < 0:
            raise TurnError(f"a turn's times must be seconds, at least 0, got {self.start_s} s to {self.end_s} s")
        if self.end_s <= self.start_s:
            raise TurnError(
                f"a turn of {self.speaker!r} must end after it starts, got {self.start_s} s to {self.end_s} s"
            )
        if self.channel is not None and self.channel < 0:
            raise TurnError(f"a turn's channel is counted from 0, got {self.channel}")

    @property
    def duration_s(self) -> float:
        """In seconds."""
        return self.end_s - self.start_s


@dataclass(frozen=True)
class TurnSettings:
    """How voice activity becomes turns.

    Args:
        threshold: Probability of speech, per window of 32 ms, from which a turn starts. It ends 0.05 below.
        min_s: Speech that is shorter, in seconds, is not a turn.
        max_s: Longer turns are split at their quietest place; None is what the host accepts.
        pad_s: Seconds that a turn gets before and after its speech, where nobody else speaks.
        merge_s: Pauses of one speaker up to so many seconds do not end a turn.
        crosstalk_db: With a speaker per channel, speech is taken for another channel's if it is so much quieter, in dB.

    Raises:
        ConfigError: A number is out of its range.

    Example:
        >>> TurnSettings(max_s=10.0).merge_s
        0.3
    """

    threshold: float = 0.5
    min_s: float = 0.25
    max_s: float | None = None
    pad_s: float = 0.1
    merge_s: float = 0.3
    crosstalk_db: float = 12.0

    def __post_init__(self) -> None:
        if not 0.05 < self.threshold < 1:
            raise ConfigError(f"threshold must be above 0.05 and below 1, got {self.threshold}")
        for name in ("min_s", "pad_s", "merge_s", "crosstalk_db"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} must be at least 0, got {value}")
        if self.max_s is not None and not self.max_s > max(2 * self.min_s, 0.5):
            raise ConfigError(f"max_s must be above 0.5 and twice min_s ({self.min_s}), got {self.max_s}")
