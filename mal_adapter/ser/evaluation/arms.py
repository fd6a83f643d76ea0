"""The arms of an evaluation: the same utterances, recognised with different histories.

This file has the one title of each arm, which the plots, the report, the command help and the docs show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from mal_adapter.errors import ConfigError

__all__ = ["ARMS", "AUDIT", "WRONG_PASTS", "Arm", "check_arms"]


class Arm(NamedTuple):
    """How people read one arm: a title of a few words, and a sentence on what the arm does."""

    title: str
    description: str


#: Arm -> its title and description, in the order of every table and plot.
ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        "host_only": Arm("without memory", "The host recognises each utterance alone."),
        "control": Arm(
            "control without a past",
            "The same adapter, trained and read with an empty memory: what training the read-out alone brings.",
        ),
        "own": Arm("with memory", "Each dialogue has its own memory."),
        "reset": Arm("empty memory", "The memory is empty before each utterance."),
        "swapped": Arm(
            "another dialogue's memory",
            "Each utterance reads what another dialogue has written up to that turn, instead of its own.",
        ),
        "other_dialogues": Arm(
            "history from other dialogues",
            "The utterances before each utterance are from other dialogues, and say nothing about its speakers.",
        ),
        "shuffled": Arm("own history in random order", "The utterances of each dialogue come in random order."),
        "oracle_speakers": Arm(
            "one memory per true speaker",
            "An oracle: each true speaker of a dialogue has a memory, instead of one for the dialogue.",
        ),
        "history": Arm(
            "history in the prompt",
            "The host alone; the audio of the utterances before each utterance is joined in front of its own.",
        ),
    }
)
#: The arms with a wrong past. The gain is specific to the dialogue's own history if accuracy is lower with each.
WRONG_PASTS = ("reset", "swapped", "other_dialogues")
#: The arms that run by default; with a control, the arm "control" too. An arm that needs a longer prompt or the true
#: speakers is requested by name.
AUDIT = ("host_only", "own", *WRONG_PASTS, "shuffled")


def check_arms(arms: Sequence[str]) -> None:
    """Raise `ConfigError` unless `arms` are different names of `ARMS`, at least one.

    Example:
        >>> check_arms(["own", "left"])
        Traceback (most recent call last):
        mal_adapter.errors.ConfigError: arms are own, left; expected different ones of host_only, control, ...
    """
    if not arms or len(set(arms)) != len(arms) or not set(arms) <= set(ARMS):
        raise ConfigError(f"arms are {', '.join(arms) or 'none'}; expected different ones of {', '.join(ARMS)}")
