"""The verdict of an evaluation: what its figures show of the memory, as a finding and in words.

A memory's gain is what the dialogue's own past adds: to the control, which is the same adapter trained and read without
a past, and to the past of another dialogue. The host alone is no measure of it. Training the read-out mends the host,
with or without a past.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from mal_adapter.ser.evaluation.arms import WRONG_PASTS

__all__ = ["Finding", "finding_of", "verdict_of"]

_SIGNIFICANT = 0.05


class Finding(Enum):
    """The possible findings; a value is the first sentence of its verdict."""

    NO_GAIN = "No gain is shown."
    READOUT_GAIN = "There is a gain over the host alone, but none over the control without a past is shown."
    UNTESTED_GAIN = "There is a gain, but it was not tested against a wrong past."
    UNSPECIFIC_GAIN = "There is a gain, but it is not shown to be specific to the dialogue's own history."
    UNCONTROLLED_GAIN = "There is a gain, but without a control it can't be separated from the read-out's."
    SPECIFIC_GAIN = "The gain is specific to the dialogue's own history."


def finding_of(figures: Mapping[str, Any]) -> Finding | None:
    """Choose the finding that the accuracies support at the 5 % level.

    The own past is better than an arm if the test over dialogues says so and no interval of the difference, over
    dialogues, speakers or folds, reaches down to zero.

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
    if "control" in figures["arms"] and not _own_is_better_than("control", figures):
        return Finding.READOUT_GAIN
    if not figures["audit"]:
        return Finding.UNTESTED_GAIN
    if _not_shown_to_be_worse(figures):
        return Finding.UNSPECIFIC_GAIN
    return Finding.SPECIFIC_GAIN if "control" in figures["arms"] else Finding.UNCONTROLLED_GAIN


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
    over_host = _compared(figures)["host_only"]["wa"]
    gain = f"{100 * over_host['difference']:+.1f} points of accuracy over the host alone"
    if "control" in figures["arms"]:
        gain = f"{_over_control(figures)}; {gain}"
    more = ""
    if finding is Finding.UNTESTED_GAIN:
        more = f" Evaluate the arms {_listed(WRONG_PASTS)} too."
    elif finding is Finding.UNSPECIFIC_GAIN:
        more = f" The accuracy of {_listed(_not_shown_to_be_worse(figures))} is not shown to be lower."
    elif finding in (Finding.SPECIFIC_GAIN, Finding.UNCONTROLLED_GAIN):
        more = f" The accuracy of {_listed(figures['audit'])} is lower."
    if finding not in (Finding.NO_GAIN, Finding.READOUT_GAIN) and "control" not in figures["arms"]:
        more += " Train the control (mal-adapter train --with-control) and evaluate with --control."
    return f"{finding.value} With memory: {gain} (p = {over_host['p_value']:.4f}).{more}"


def _over_control(figures: Mapping[str, Any]) -> str:
    """The gain over the control in words, with its intervals."""
    entry, clusters = _compared(figures)["control"], figures.get("clusters", {})
    intervals = [
        f"{100 * bounds['wa'][0]:+.1f} to {100 * bounds['wa'][1]:+.1f} over {clusters[kind]} {kind}"
        for kind, bounds in entry.get("intervals", {}).items()
    ]
    if intervals and not {"speakers", "folds"} & clusters.keys():
        intervals.append("too few speakers for an interval over them")
    words = f" (95 %: {'; '.join(intervals)})" if intervals else ""
    return f"{100 * entry['wa']['difference']:+.1f} points of accuracy over the control{words}"


def _compared(figures: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {entry["first"]: entry for entry in figures["compared"]}


def _own_is_better_than(arm: str, figures: Mapping[str, Any]) -> bool:
    entry = _compared(figures)[arm]
    significant = entry["wa"]["difference"] > 0 and entry["wa"]["p_value"] <= _SIGNIFICANT
    return significant and all(bounds["wa"][0] > 0 for bounds in entry.get("intervals", {}).values())


def _not_shown_to_be_worse(figures: Mapping[str, Any]) -> list[str]:
    """The wrong pasts over which the own past has no significant advantage."""
    return [arm for arm in figures["audit"] if not _own_is_better_than(arm, figures)]


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
