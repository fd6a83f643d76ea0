"""Check the arguments of `evaluate` before the host runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mal_adapter.errors import ConfigError, EvaluationError, MalAdapterError
from mal_adapter.memory.config import check_integer
from mal_adapter.memory.ensemble import AnyAdapter
from mal_adapter.ser.dialogue import Dialogue
from mal_adapter.ser.evaluation.arms import check_arms
from mal_adapter.ser.evaluation.control import HOW_TO_TRAIN, control_problems
from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer
from mal_adapter.ser.suitability import id_problems, label_problems
from mal_adapter.serialization.atomic import folder_problem

__all__ = ["argument_problems"]


def argument_problems(
    recognizer: EmotionRecognizer,
    dialogues: list[Dialogue],
    arms: Sequence[str],
    control: AnyAdapter | None,
    activations: str | os.PathLike[str] | None,
    settings: Mapping[str, object],
) -> list[MalAdapterError]:
    """Find all problems with the arguments of `evaluate`, apart from its output folder and the sound files.

    Args:
        recognizer, dialogues, arms, control, activations: As for `evaluate`.
        settings: Name -> value of those that are integers.

    Returns:
        An error per problem, none of them raised.
    """
    problems = _control_problems(recognizer, control, arms)
    problems += _activations_problems(recognizer, activations)
    problems += _arm_problems(recognizer, dialogues, arms)
    for name, value in settings.items():
        try:
            check_integer(name, value, 0 if name == "seed" else 1)
        except ConfigError as error:
            problems.append(error)
    # Each arm chooses its own session ids, so that a dialogue id need not be a valid session id.
    if ids := id_problems(dialogues, reads_memory=False, needed=True):
        return problems + ids
    return problems + label_problems(dialogues, recognizer.labels)


def _arm_problems(
    recognizer: EmotionRecognizer, dialogues: list[Dialogue], arms: Sequence[str]
) -> list[MalAdapterError]:
    try:
        check_arms(arms)
    except ConfigError as error:
        return [error]
    problems: list[MalAdapterError] = []
    if not recognizer.reads_memory and (needed := sorted(set(arms) - {"host_only", "history"})):
        problems.append(ConfigError(f"the arms {', '.join(needed)} need a memory, and this recogniser has none"))
    if "swapped" in arms and "own" not in arms:
        problems.append(
            ConfigError(
                "the arm 'swapped' reads the memories that 'own' writes; give both arms, or leave out 'swapped'"
            )
        )
    if len(dialogues) == 1 and {"swapped", "other_dialogues"} & set(arms):
        problems.append(
            ConfigError(
                "the arms 'swapped' and 'other_dialogues' need at least two dialogues, got 1; add dialogues, or leave "
                "out these arms"
            )
        )
    speakers = [{getattr(u, "speaker", None) for u in getattr(d, "utterances", ())} for d in dialogues]
    if "oracle_speakers" in arms and max(map(len, speakers), default=0) == 1:
        problems.append(
            ConfigError(
                "the arm 'oracle_speakers' has one memory per true speaker, but no dialogue has two speakers, so it "
                "would repeat 'own'; name the speakers, or leave out this arm"
            )
        )
    return problems


def _activations_problems(
    recognizer: EmotionRecognizer, activations: str | os.PathLike[str] | None
) -> list[MalAdapterError]:
    if activations is None:
        return []
    if recognizer.memory is None:
        return [ConfigError("activations are of the memory's layer, and this recogniser has no memory; leave them out")]
    if hasattr(recognizer.model, "peft_config") or getattr(recognizer.model, "_hf_peft_config_loaded", False):
        return [ConfigError("a host with a LoRA can't share its activations with others; leave out activations")]
    return [EvaluationError(problem)] if (problem := folder_problem(Path(activations))) else []


def _control_problems(
    recognizer: EmotionRecognizer, control: AnyAdapter | None, arms: Sequence[str]
) -> list[MalAdapterError]:
    if control is None:
        return [ConfigError(f"the arm 'control' needs a control; {HOW_TO_TRAIN}")] if "control" in arms else []
    if "control" not in arms:
        return [ConfigError("a control is given, but the arm 'control' is not among the arms; add it")]
    return control_problems(recognizer, control)
