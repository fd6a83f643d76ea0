"""Train several memories of one host from different seeds, and save them as one adapter."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from mal_adapter.attach import attach_memory
from mal_adapter.errors import (
    ConfigError,
    MalAdapterError,
    SharedSpeakersWarning,
    TrainingError,
    UninformativeDataWarning,
    raise_problems,
)
from mal_adapter.memory.adapter import MemoryAdapter
from mal_adapter.memory.config import MemoryConfig, check_integer
from mal_adapter.memory.ensemble import MemoryEnsemble
from mal_adapter.memory.hub_mixin import MOST_MEMBERS
from mal_adapter.ser.dialogue import Dialogue
from mal_adapter.ser.labels import LabelSet
from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer
from mal_adapter.ser.training.arguments import output_problem
from mal_adapter.ser.training.checkpoint import CHECKPOINT_NAME
from mal_adapter.ser.training.config import TrainingConfig
from mal_adapter.ser.training.train import ACTIVATIONS_NAME, REPORT_NAME, train_memory
from mal_adapter.serialization.adapter_folder import WEIGHTS_NAME
from mal_adapter.serialization.atomic import write_atomically

__all__ = ["MEMBERS_NAME", "members_problems", "train_members"]

MEMBERS_NAME = "members"


def train_members(
    model: Any,
    processor: Any,
    layer_idx: int,
    train: Sequence[Dialogue],
    dev: Sequence[Dialogue] = (),
    *,
    members: int,
    output: str | os.PathLike[str],
    memory: MemoryConfig | None = None,
    config: TrainingConfig | None = None,
    labels: LabelSet | Sequence[str] | None = None,
    prompt: str | None = None,
    resume: bool = False,
    activations: str | os.PathLike[str] | None = None,
    log_with: str | None = None,
    training_data: str | None = None,
    datasets: Sequence[str] = (),
) -> dict[str, Any]:
    """Train memories with the seeds `config.seed`, `config.seed + 1`, …, and save them in `output` as one adapter.

    Each member is what `train_memory` makes of a fresh memory with its seed, to the bit, and is also saved alone, in
    the folder `members/0`, `members/1`, … of `output`, with its checkpoint and report. With one member, `output` is
    that folder. With `cache_activations` the frozen part of the host runs once for all members.

    What is mutated: As for `train_memory`. The model has no memory afterwards.

    Args:
        model, processor: The host, without a memory.
        layer_idx: The decoder layer after which the memory is read.
        train, dev: As for `train_memory`.
        members: Their number, from 1 to 64.
        output: For the adapter, its members, and `training.json`, whose `members` are the reports of all.
        memory: The configuration of each member; `MemoryConfig()` if None.
        config: The settings; `TrainingConfig()` if None.
        labels, prompt: As for `EmotionRecognizer`.
        resume: Continue from the members' checkpoints. Members that are complete stay as they are.
        activations: As for `train_memory`; `activations` in `output` if None.
        log_with, training_data, datasets: As for `train_memory`.

    Returns:
        The content of `training.json`.

    Raises:
        ConfigError: `members` is not an integer from 1 to 64; several are to be trained with a LoRA, which would give
            each a host of its own; or as `train_memory`.
        AdapterFormatError, AudioError, HostError, LabelError, TrainingError, MissingDependencyError: As `train_memory`.
    """
    output, config = Path(output), TrainingConfig() if config is None else config
    raise_problems(members_problems(output, members, config, resume))
    folders = member_folders(output, members)
    if config.cache_activations and activations is None:
        activations = output / ACTIVATIONS_NAME
    trained: list[MemoryAdapter] = []
    reports: list[dict[str, Any]] = []
    for index, folder in enumerate(folders):
        settings = dataclasses.replace(config, seed=config.seed + index)
        torch.manual_seed(settings.seed)
        with attach_memory(model, layer_idx, config=memory) as attached, warnings.catch_warnings():
            for kind in (SharedSpeakersWarning, UninformativeDataWarning) if index else ():  # of the same dialogues
                warnings.simplefilter("ignore", kind)
            recognizer = EmotionRecognizer(model, processor, attached, labels, prompt)
            attached.adapter.check_folder(output, attached.adapter.metadata)
            report = train_memory(
                recognizer,
                train,
                dev,
                output=folder,
                config=settings,
                resume=resume,
                activations=activations,
                log_with=log_with,
                training_data=training_data,
                datasets=datasets,
            )
            trained += attached.adapter.members
        reports.append(report)
    if members == 1:
        return reports[0]
    state, together = PartialState(), {"members": reports}
    if state.is_main_process:
        MemoryEnsemble(trained).save_pretrained(output)
        write_atomically(output / REPORT_NAME, (json.dumps(together, indent=2) + "\n").encode())
    state.wait_for_everyone()
    return together


def members_problems(output: Path, members: int, config: TrainingConfig, resume: bool) -> list[MalAdapterError]:
    """Why so many members can't be trained into this folder; before anything runs."""
    try:
        check_integer("members", members, 1)
    except ConfigError as error:
        return [error]
    problems: list[MalAdapterError] = []
    if members > MOST_MEMBERS:
        return [ConfigError(f"members={members} is more than {MOST_MEMBERS}; their answers take as many forwards")]
    if members > 1 and config.lora_rank is not None:
        problems.append(
            ConfigError(
                "with a LoRA each member would have a host of its own, so that no forward could be shared; leave out "
                "lora_rank or members"
            )
        )
    folders = member_folders(output, members)
    problems += [problem for folder in folders if (problem := output_problem(folder, resume)) is not None]
    if members > 1:
        found = [name for name in (CHECKPOINT_NAME, WEIGHTS_NAME) if (output / name).exists()]
        complete = found == [WEIGHTS_NAME] and (folders[0] / CHECKPOINT_NAME).exists()
        if found and not (resume and complete):
            problems.append(
                TrainingError(
                    f"{output} has an adapter already ({found[0]}), which training would replace; train into another "
                    "folder"
                )
            )
    return problems


def member_folders(output: Path, members: int) -> list[Path]:
    """Where each member is trained."""
    return [output] if members == 1 else [output / MEMBERS_NAME / str(index) for index in range(members)]
