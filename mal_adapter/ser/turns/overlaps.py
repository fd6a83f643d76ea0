"""Which turns overlap with another speaker's, and whether turns fit their recording."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from mal_adapter.errors import TurnError
from mal_adapter.ser.turns.turn import Turn

__all__ = ["mark_overlaps", "turns_within"]

TOLERANCE_S = 0.5  # rounded times, and lengths that codecs pad, differ by less


def mark_overlaps(turns: Iterable[Turn]) -> list[Turn]:
    """Mark the turns during which another person speaks, and sort them.

    Args:
        turns: In any order. Turns of the speaker "?" are taken as different persons': their own turns do not overlap.

    Returns:
        The turns in order, with `overlaps` set or cleared.

    Example:
        >>> a, b, c = mark_overlaps([Turn(1.5, 3.0, "B"), Turn(0.0, 2.0, "A"), Turn(3.0, 4.0, "A")])
        >>> a.overlaps, b.overlaps, c.overlaps
        (True, True, False)
    """
    ordered = sorted(turns, key=_order)
    speakers: list[object] = [number if turn.speaker == "?" else turn.speaker for number, turn in enumerate(ordered)]
    ends = _best_of_others(speakers, [turn.end_s for turn in ordered])
    # From the last turn to the first, the best is the earliest start: negated, it is a greatest value too.
    starts = _best_of_others(speakers[::-1], [-turn.start_s for turn in ordered[::-1]])[::-1]
    return [
        replace(turn, overlaps=end_s > turn.start_s or -start_s < turn.end_s)
        for turn, end_s, start_s in zip(ordered, ends, starts, strict=True)
    ]


def turns_within(turns: Sequence[Turn], duration_s: float) -> list[Turn]:
    """Fit turns to a recording: ends up to half a second beyond its end are moved to its end.

    Args:
        turns: In any order.
        duration_s: The length of the recording in seconds.

    Raises:
        TurnError: A turn is farther beyond the end, so the turns are of another recording, or in another unit.

    Example:
        >>> turns_within([Turn(0.0, 8.1, "A")], duration_s=8.0)[0].end_s
        8.0
        >>> turns_within([Turn(7.0, 9.0, "A")], duration_s=8.0)
        Traceback (most recent call last):
        mal_adapter.errors.TurnError: the turn of 'A' from 7.0 s to 9.0 s ends after ...
    """
    fitting = []
    for turn in turns:
        if turn.end_s > duration_s + TOLERANCE_S or turn.start_s >= duration_s:
            raise TurnError(
                f"the turn of {turn.speaker!r} from {turn.start_s} s to {turn.end_s} s ends after the recording, which "
                f"has {duration_s:.3f} s; check that the turns are of this recording, and that times are in seconds"
            )
        fitting.append(turn if turn.end_s <= duration_s else replace(turn, end_s=duration_s))
    return fitting


def _order(turn: Turn) -> tuple[float, float, str]:
    return turn.start_s, turn.end_s, turn.speaker


def _best_of_others(speakers: Sequence[object], values: Sequence[float]) -> list[float]:
    """For each place, the greatest value at earlier places of other speakers; minus infinity if there is none."""
    nothing = -float("inf")
    best_speaker: object = None
    best, second = nothing, nothing  # `second` is the greatest value of all speakers but the best one
    found = []
    for speaker, value in zip(speakers, values, strict=True):
        found.append(second if speaker == best_speaker else best)
        if speaker == best_speaker:
            best = max(best, value)
        elif value > best:
            best_speaker, best, second = speaker, value, best
        else:
            second = max(second, value)
    return found
