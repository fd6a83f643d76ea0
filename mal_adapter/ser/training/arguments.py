"""Check the arguments of `train_memory` before the host runs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from mal_adapter.errors import ConfigError, MalAdapterError, MissingDependencyError, TrainingError
from mal_adapter.extras import missing_dependency
from mal_adapter.ser.dialogue import Dialogue
from mal_adapter.ser.labels import LabelSet
from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer
from mal_adapter.ser.suitability import id_problems, label_problems, sound_problems
from mal_adapter.ser.training.checkpoint import CHECKPOINT_NAME
from mal_adapter.ser.training.config import TrainingConfig
from mal_adapter.ser.training.loss import class_weights, target_of
from mal_adapter.serialization.adapter_folder import WEIGHTS_NAME
from mal_adapter.serialization.atomic import folder_problem

if TYPE_CHECKING:
    from mal_adapter.attach import AttachedMemory

__all__ = ["argument_problems", "output_problem", "trainable_memory"]


def trainable_memory(recognizer: EmotionRecognizer) -> AttachedMemory:
    """Return the recogniser's memory.

    Raises:
        ConfigError: The recogniser has no memory or doesn't read it, or the adapter has several members.
        SessionError: The memory is detached, or the caller's block has a session open.
    """
    if recognizer.memory is None:
        raise ConfigError("this recogniser has no memory to train; make one with attach_memory(model, layer_idx=...)")
    if not recognizer.reads_memory:
        raise ConfigError("this recogniser was made by without_memory(); train the recogniser that it was made from")
    if (members := len(recognizer.memory.adapter.members)) > 1:
        raise ConfigError(
            f"this adapter has {members} members, which are trained one at a time: mal-adapter train --members "
            f"{members}, or train_members"
        )
    with recognizer.memory.session(write=False):  # raises if no session can be opened
        pass
    return recognizer.memory


def argument_problems(
    recognizer: EmotionRecognizer,
    train: Sequence[Dialogue],
    dev: Sequence[Dialogue],
    output: Path,
    config: object,
    resume: bool,
    log_with: str | None,
    training_data: str | None,
    datasets: Sequence[str],
    activations: str | os.PathLike[str] | None,
) -> list[MalAdapterError]:
    """Find all problems with the arguments of `train_memory`, which has the same names.

    Returns:
        An error per problem, none of them raised; empty if training can start.
    """
    if not isinstance(config, TrainingConfig):
        return [
            ConfigError(f"config is a {type(config).__name__}; give a TrainingConfig, or TrainingConfig.from_dict()")
        ]
    problems: list[MalAdapterError] = []
    labels = recognizer.labels
    for what, dialogues in (("training", train), ("dev", dev)):
        found = id_problems(dialogues, what, needed=what == "training")
        if not found and dialogues:
            found = label_problems(dialogues, labels, what) or sound_problems(dialogues, labels, what)
        problems += found
    if not problems:
        problems += _weight_problems(config, train, labels)
    problems += _setting_problems(recognizer, config, log_with)
    if activations is not None:
        problems += _activations_problems(Path(activations), config)
    try:
        adapter = trainable_memory(recognizer).adapter
        metadata = adapter.metadata.with_task(labels.names, recognizer.prompt)
        _check_datasets(datasets)
        metadata = dataclasses.replace(metadata, training_data=training_data, datasets=list(datasets))
        adapter.check_folder(output, metadata)
    except MalAdapterError as error:
        problems.append(error)
    else:
        problems += [problem] if (problem := output_problem(output, resume)) is not None else []
    return problems


def _check_datasets(datasets: Sequence[str]) -> None:
    """Raise ConfigError if a name is not a Hub id; the Hub would refuse the model card when the adapter is pushed."""
    if isinstance(datasets, str):  # a sequence of strings, too
        raise ConfigError(f"datasets={datasets!r} is a string; give a list of Hub ids")
    for name in datasets:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ConfigError(
                f"datasets has {name!r}, which is not a Hub id such as user/meld; leave it out"
            ) from error


def _weight_problems(config: TrainingConfig, train: Sequence[Dialogue], labels: LabelSet) -> list[MalAdapterError]:
    try:
        weights = class_weights(config.class_weights, train, labels)
    except ConfigError as error:
        return [error]
    targets = {target_of(utterance, labels) for dialogue in train for utterance in dialogue.utterances} - {None}
    if any(weights[target] > 0 for target in targets):
        return []
    return [
        ConfigError(f"class_weights={config.class_weights} are zero for every label that the training dialogues have")
    ]


def _setting_problems(
    recognizer: EmotionRecognizer, config: TrainingConfig, log_with: str | None
) -> list[MalAdapterError]:
    problems: list[MalAdapterError] = []
    for name in ("gradient_checkpointing", "cache_activations"):
        if getattr(config, name) and recognizer.labels_need_cache:
            problems.append(
                ConfigError(
                    f"{name} needs labels that are one token each for this host, since longer labels are scored with a "
                    "KV cache of all layers; leave it off, or choose other labels"
                )
            )
    if config.lora_rank is not None and (missing := missing_dependency("lora_rank", "peft", extra="train")):
        problems.append(missing)
    trackers = ["all", *map(str, get_available_trackers())]
    if log_with in set(LoggerType.list()) - set(trackers):
        # accelerate leaves out a tracker that is not installed, without a word
        problems.append(
            MissingDependencyError(
                f"log_with={log_with!r} needs {log_with}, which is not installed: pip install {log_with}", name=log_with
            )
        )
    elif log_with is not None and log_with not in trackers:
        problems.append(
            ConfigError(f"log_with={log_with!r} is not a tracker; installed here are: {', '.join(trackers)}")
        )
    return problems


def _activations_problems(folder: Path, config: TrainingConfig) -> list[MalAdapterError]:
    if not config.cache_activations:
        return [ConfigError(f"activations='{folder}' is given, but nothing is cached; set cache_activations=True")]
    return [ConfigError(problem)] if (problem := folder_problem(folder)) else []


def output_problem(output: Path, resume: bool) -> MalAdapterError | None:
    """Return an error if the folder can't be written to, or has the results of another run; else None."""
    if problem := folder_problem(output):
        return TrainingError(problem)
    if (checkpoint := output / CHECKPOINT_NAME).exists():
        if not resume:
            return TrainingError(f"{checkpoint} already exists; resume that run, or train into another folder")
    elif (output / WEIGHTS_NAME).exists():
        return TrainingError(
            f"{output} has an adapter without a checkpoint; training would replace it, so train into another folder"
        )
    return None
