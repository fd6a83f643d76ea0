"""From speech to turns: padded, in order of start, marked where another speaker speaks too."""

import math
from collections.abc import Sequence

from mal_adapter.ser.turns.speech import Speech
from mal_adapter.ser.turns.turn import Turn, TurnSettings

__all__ = ["OVERLAP_S", "TurnShaper"]

#: Speech of two channels overlaps if both speak for so long, in seconds; starts and ends are not known more exactly.
OVERLAP_S = 0.1


class TurnShaper:
    """Makes turns of the speech of several channels, as it ends.

    A turn gets `pad_s` before and after its speech; where other speech is nearer than twice of that, the pause between
    them is divided.

    Args:
        speakers: Per channel.
        settings: `pad_s` and `max_s` are used.
        mixed: Whether the only channel is the mean of all; its turns name no channel.

    Example:
        >>> shaper = TurnShaper(["customer", "agent"])
        >>> shaper.add([Speech(1.0, 2.0, channel=1)], settled_s=1.5)
        []
        >>> shaper.add([Speech(2.1, 3.0, channel=0)], settled_s=9.0)[0]
        Turn(start_s=0.9, end_s=2.05, speaker='agent', channel=1, text=None, emotion=None, overlaps=False)
    """

    def __init__(self, speakers: Sequence[str], settings: TurnSettings | None = None, *, mixed: bool = False) -> None:
        settings = settings or TurnSettings()
        self._speakers = list(speakers)
        self._mixed = mixed
        # Both ends of the longest turn must find room in it.
        self._pad_s = settings.pad_s if settings.max_s is None else min(settings.pad_s, settings.max_s / 4)
        self._waiting: list[Speech] = []
        self._before: list[Speech] = []  # given, and not over when the next may start
        self._last_end_s = -math.inf  # of all that were given

    def add(self, speech: Sequence[Speech], settled_s: float) -> list[Turn]:
        """Take speech that has ended.

        Args:
            speech: In any order.
            settled_s: All speech that is still to come starts at this time or later.

        Returns:
            The turns that nothing to come can change, in order of start.
        """
        self._waiting = sorted([*self._waiting, *speech], key=lambda one: (one.start_s, one.channel))
        turns = []
        while self._waiting and self._waiting[0].end_s + 2 * self._pad_s <= settled_s:
            turns.append(self._turn(self._waiting.pop(0)))
        return turns

    def finish(self, duration_s: float) -> list[Turn]:
        """The turns that are left, at the end of the recording."""
        turns = []
        while self._waiting:
            turns.append(self._turn(self._waiting.pop(0), duration_s))
        return turns

    def _turn(self, speech: Speech, duration_s: float = math.inf) -> Turn:
        self._before = [one for one in self._before if one.end_s > speech.start_s]
        others = [one for one in (*self._before, *self._waiting) if one.channel != speech.channel]
        common_s = (min(one.end_s, speech.end_s) - max(one.start_s, speech.start_s) for one in others)
        next_s = min((one.start_s for one in self._waiting if one.end_s > speech.end_s), default=math.inf)
        if any(one.end_s > speech.end_s for one in self._before):
            next_s = speech.end_s
        before_s = min(self._pad_s, speech.start_s, max(0.0, speech.start_s - self._last_end_s) / 2)
        after_s = min(self._pad_s, duration_s - speech.end_s, max(0.0, next_s - speech.end_s) / 2)
        self._before.append(speech)
        self._last_end_s = max(self._last_end_s, speech.end_s)
        return Turn(
            speech.start_s - before_s,
            speech.end_s + after_s,
            self._speakers[speech.channel],
            None if self._mixed else speech.channel,
            overlaps=any(seconds >= OVERLAP_S for seconds in common_s),
        )
