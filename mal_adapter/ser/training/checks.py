"""What is wrong with the arguments of a training, as far as that is known before the host runs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.tracking import get_available_trackers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from mal_adapter.errors import ConfigError, MalAdapterError, TrainingError
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

__all__ = ["output_problem", "trained_memory", "training_problems"]


def trained_memory(recognizer: EmotionRecognizer) -> AttachedMemory:
    """The recogniser's memory, if it can be trained.

    Raises:
        ConfigError: there is none, or it is not read.
        SessionError: it is detached, or the caller's block has a session open.
    """
    if recognizer.memory is None:
        raise ConfigError("this recogniser has no memory to train; make one by attach_memory(model, layer_idx=...)")
    if not recognizer.reads_memory:
        raise ConfigError("this recogniser was made by without_memory(); train the one that it was made from")
    with recognizer.memory.session(write=False):  # raises where none can be opened
        pass
    return recognizer.memory


def training_problems(
    recognizer: EmotionRecognizer,
    train: Sequence[Dialogue],
    dev: Sequence[Dialogue],
    output: Path,
    config: object,
    resume: bool,
    log_with: str | None,
    training_data: str | None,
    datasets: Sequence[str],
    activations: str | os.PathLike[str] | None = None,
) -> list[MalAdapterError]:
    """What is wrong with the arguments of `train_memory`, all of it."""
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
        adapter = trained_memory(recognizer).adapter
        card = adapter.metadata.with_task(labels.names, recognizer.prompt)
        _check_datasets(datasets)
        card = dataclasses.replace(card, training_data=training_data, datasets=list(datasets))
        adapter.check_folder(output, card)
    except MalAdapterError as error:
        problems.append(error)
    else:
        problems += [problem] if (problem := output_problem(output, resume)) is not None else []
    return problems


def _check_datasets(datasets: Sequence[str]) -> None:
    """The Hub refuses a card with other names, and that only when the trained adapter is pushed."""
    if isinstance(datasets, str):  # a sequence of strings too, but not meant
        raise ConfigError(f"datasets={datasets!r} is a string; give a list of Hub ids")
    for name in datasets:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ConfigError(f"datasets has {name!r}, which is no Hub id such as user/meld; leave it out") from error


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
                    f"{name} needs labels of one token each to this host, since longer ones go on from a KV cache of "
                    "all layers; leave it off or choose other labels"
                )
            )
    if config.lora_rank is not None and find_spec("peft") is None:
        problems.append(TrainingError("lora_rank needs peft: pip install 'mal-adapter[train]'"))
    trackers = ["all", *map(str, get_available_trackers())]
    if log_with is not None and log_with not in trackers:
        # accelerate leaves out a tracker that is not installed, without a word
        problems.append(
            ConfigError(f"log_with={log_with!r} is no tracker that is installed here; these are: {', '.join(trackers)}")
        )
    return problems


def _activations_problems(folder: Path, config: TrainingConfig) -> list[MalAdapterError]:
    if not config.cache_activations:
        return [ConfigError(f"activations='{folder}' is given, but nothing is cached; set cache_activations=True")]
    return [ConfigError(problem)] if (problem := folder_problem(folder)) else []


def output_problem(output: Path, resume: bool) -> MalAdapterError | None:
    """That the folder can't be written to, or holds another run's work, which training would replace."""
    if problem := folder_problem(output):
        return TrainingError(problem)
    if (checkpoint := output / CHECKPOINT_NAME).exists():
        if not resume:
            return TrainingError(f"{checkpoint} is there already; resume that run, or train into another folder")
    elif (output / WEIGHTS_NAME).exists():
        return TrainingError(
            f"{output} holds an adapter and no checkpoint of its training; it would be lost: train into another folder"
        )
    return None
