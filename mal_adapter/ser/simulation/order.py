"""Who speaks when."""

import random
from collections.abc import Sequence
from typing import TypeVar

__all__ = ["turn_order"]

_Speaker = TypeVar("_Speaker")


def turn_order(
    speakers: Sequence[_Speaker], turns: int, turn_taking: str, change: float, chance: random.Random
) -> list[_Speaker]:
    """The speaker of each turn.

    Args:
        speakers: At least one; the first one begins.
        turn_taking: "alternating": one after the other, again and again. "random": with the probability `change` the
            next turn is another speaker's, each of them equally often.

    Example:
        >>> turn_order("AB", 5, "alternating", 0.7, random.Random(0))
        ['A', 'B', 'A', 'B', 'A']
    """
    if turn_taking == "alternating":
        return [speakers[turn % len(speakers)] for turn in range(turns)]
    order = [0]
    while len(order) < turns:
        now = order[-1]
        other = len(speakers) > 1 and chance.random() < change
        order.append((now + 1 + chance.randrange(len(speakers) - 1)) % len(speakers) if other else now)
    return [speakers[place] for place in order]
