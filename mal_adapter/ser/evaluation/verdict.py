"""The verdict of an evaluation: what its figures show of the memory, as a finding and in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from mal_adapter.ser.evaluation.arms import WRONG_PASTS

__all__ = ["Finding", "finding_of", "verdict_of"]

_SIGNIFICANT = 0.05


class Finding(Enum):
    """The four possible findings; a value is the first sentence of its verdict."""

    NO_GAIN = "No gain is shown."
    UNTESTED_GAIN = "There is a gain, but it was not tested against a wrong past."
    UNSPECIFIC_GAIN = "There is a gain, but it is not shown to be specific to the dialogue's own history."
    SPECIFIC_GAIN = "The gain is specific to the dialogue's own history."


def finding_of(figures: Mapping[str, Any]) -> Finding | None:
    """Choose the finding that the accuracies support at the 5 % level.

    Args:
        figures: With `arms`, `compared` and `audit`, as `mal_adapter.ser.evaluation.report.figures_of` makes them.

    Returns:
        None without the arms "own" and "host_only", since the gain is their difference.

    Example:
        >>> gain = {"first": "host_only", "wa": {"difference": 0.1, "p_value": 0.01}}
        >>> finding_of({"arms": {"own": {}, "host_only": {}}, "compared": [gain], "audit": {}}).name
        'UNTESTED_GAIN'
    """
    if not {"own", "host_only"} <= figures["arms"].keys():
        return None
    if not _own_is_better_than("host_only", figures):
        return Finding.NO_GAIN
    if not figures["audit"]:
        return Finding.UNTESTED_GAIN
    return Finding.UNSPECIFIC_GAIN if _not_shown_to_be_worse(figures) else Finding.SPECIFIC_GAIN


def verdict_of(figures: Mapping[str, Any]) -> str:
    """Write the finding in words, with its figures; an empty string if there is none.

    Args:
        figures: As for `finding_of`.

    Example:
        >>> gain = {"first": "host_only", "wa": {"difference": 0.02, "p_value": 0.7}}
        >>> verdict_of({"arms": {"own": {}, "host_only": {}}, "compared": [gain], "audit": {}})
        'No gain is shown. With memory: +2.0 points of accuracy over the host alone (p = 0.7000).'
    """
    finding = finding_of(figures)
    if finding is None:
        return ""
    over_host = _wa_of(figures)["host_only"]
    gain = (
        f"{100 * over_host['difference']:+.1f} points of accuracy over the host alone (p = {over_host['p_value']:.4f})"
    )
    more = ""
    if finding is Finding.UNTESTED_GAIN:
        more = f" Evaluate the arms {_listed(WRONG_PASTS)} too."
    elif finding is Finding.UNSPECIFIC_GAIN:
        more = f" The accuracy of {_listed(_not_shown_to_be_worse(figures))} is not shown to be lower."
    elif finding is Finding.SPECIFIC_GAIN:
        more = f" The accuracy of {_listed(figures['audit'])} is lower."
    return f"{finding.value} With memory: {gain}.{more}"


def _wa_of(figures: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    return {entry["first"]: entry["wa"] for entry in figures["compared"]}


def _own_is_better_than(arm: str, figures: Mapping[str, Any]) -> bool:
    compared = _wa_of(figures)[arm]
    return compared["difference"] > 0 and compared["p_value"] <= _SIGNIFICANT


def _not_shown_to_be_worse(figures: Mapping[str, Any]) -> list[str]:
    """The wrong pasts over which the own past has no significant advantage."""
    return [arm for arm in figures["audit"] if not _own_is_better_than(arm, figures)]


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
