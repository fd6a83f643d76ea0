"""The control of an evaluation: an adapter that was trained as the memory was, but without a past."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mal_adapter.errors import ConfigError, MalAdapterError
from mal_adapter.memory.adapter import MemoryAdapter
from mal_adapter.memory.ensemble import AnyAdapter, MemoryEnsemble, load_adapter
from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer

__all__ = ["CONTROL_NAME", "HOW_TO_TRAIN", "control_problems", "load_control"]

#: The folder of the control within the memory's, as `mal-adapter train --with-control` writes it.
CONTROL_NAME = "control"
HOW_TO_TRAIN = (
    "train one with mal-adapter train --with-control, or with the same data, seed and settings and "
    'MemoryConfig(update="none")'
)
_SAME = ("memory_dim", "num_heads", "depth", "expansion", "readout_dim", "pool_utterance")


def load_control(adapter: AnyAdapter | str | os.PathLike[str]) -> AnyAdapter:
    """The control of this name, or the adapter itself.

    Args:
        adapter: A folder, a Hub id, or a loaded adapter.

    Raises:
        ConfigError: A LoRA was trained with it.
        AdapterNotFoundError, AdapterFormatError, HubError: As `MemoryAdapter.from_pretrained`.
    """
    if isinstance(adapter, MemoryAdapter | MemoryEnsemble):
        return adapter
    if Path(adapter, "lora").is_dir():
        raise ConfigError(
            f"the control {os.fspath(adapter)} has a LoRA of its own, so it is not the same host as the memory's; "
            "evaluate it alone, as --adapter, and compare it with --against"
        )
    return load_adapter(adapter)


def control_problems(recognizer: EmotionRecognizer, control: AnyAdapter) -> list[MalAdapterError]:
    """Why an adapter is not the control of the recogniser's memory."""
    if recognizer.memory is None or not recognizer.reads_memory:
        return [ConfigError("a control is for a memory, and this recogniser has none; leave out one of them")]
    memory, problems = recognizer.memory, list[MalAdapterError]()
    if control.config.update != "none":
        problems.append(
            ConfigError(f"this control has update={control.config.update!r}, so it reads a past; {HOW_TO_TRAIN}")
        )
    differs = _differences(memory.adapter, control, memory.layer_idx)
    if differs:
        words = ", ".join(f"{name} is {theirs!r} and the memory's {ours!r}" for name, (theirs, ours) in differs.items())
        problems.append(ConfigError(f"this control is of another memory: its {words}; {HOW_TO_TRAIN}"))
    return problems


def _differences(memory: AnyAdapter, control: AnyAdapter, layer_idx: int) -> dict[str, tuple[Any, Any]]:
    """Field -> (the control's, the memory's), where they differ."""
    fields: dict[str, tuple[Any, Any]] = {"hidden_size": (control.config.hidden_size, memory.config.hidden_size)}
    fields["number of members"] = (len(control.members), len(memory.members))
    if memory.config.update == "titans":  # the memories of other updates have other parameters
        fields |= {name: (getattr(control.config, name), getattr(memory.config, name)) for name in _SAME}
    if control.metadata.layer_idx is not None:
        fields["layer"] = (control.metadata.layer_idx, layer_idx)
    tasks = (control.metadata.task, memory.metadata.task)
    if None not in tasks:
        fields |= {name: (tasks[0].get(name), tasks[1].get(name)) for name in ("labels", "prompt")}  # type: ignore[union-attr]
    return {name: pair for name, pair in fields.items() if pair[0] != pair[1]}
