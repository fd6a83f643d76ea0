"""The format of an adapter folder or Hub repository: `config.json`, `model.safetensors`, `README.md`."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mal_adapter.config import MemoryConfig
from mal_adapter.errors import AdapterFormatError, ConfigError
from mal_adapter.state import write_atomically

__all__ = ["AdapterCard", "read_adapter", "write_adapter"]

FORMAT_VERSION = 1
CONFIG_NAME, WEIGHTS_NAME, CARD_NAME = "config.json", "model.safetensors", "README.md"


@dataclasses.dataclass(frozen=True)
class AdapterCard:
    """Where an adapter belongs: everything about its host and task that its weights do not say.

    Attributes:
        layer_idx: The decoder layer it was trained on.
        base_model_name_or_path: The host checkpoint's name.
        model_type: The host's `config.model_type`.
        hidden_size: The width of the host's decoder layers.
        num_hidden_layers: How many decoder layers the host has.
        task: `{"labels": [...], "prompt": "..."}` of the recogniser it was trained for, or None.
    """

    layer_idx: int | None = None
    base_model_name_or_path: str | None = None
    model_type: str | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    task: dict[str, Any] | None = None

    def with_task(self, labels: Sequence[str], prompt: str) -> "AdapterCard":
        """The card of an adapter trained to answer `prompt` with one of `labels`."""
        return dataclasses.replace(self, task={"labels": list(labels), "prompt": prompt})


def write_adapter(
    folder: str | os.PathLike[str], config: MemoryConfig, card: AdapterCard, tensors: Mapping[str, Tensor]
) -> None:
    """Write an adapter folder; each file appears whole, the weights last.

    Raises:
        AdapterFormatError: `folder` holds another model's `config.json`, or is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise AdapterFormatError(f"{folder} is a file; give a folder to save the adapter in")
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / CONFIG_NAME).exists():
        try:
            _parse_config((folder / CONFIG_NAME).read_bytes())
        except AdapterFormatError as error:
            raise AdapterFormatError(
                f"{folder} holds something other than an adapter ({error}); give another"
            ) from error
    content = {
        "library_name": "mal_adapter",
        "library_version": version("mal-adapter"),
        "format_version": FORMAT_VERSION,
        **dataclasses.asdict(card),
        "memory": config.to_dict(),
    }
    write_atomically(folder / CARD_NAME, _model_card(config, card).encode())
    write_atomically(folder / CONFIG_NAME, (json.dumps(content, indent=2) + "\n").encode())
    write_atomically(folder / WEIGHTS_NAME, save(dict(tensors), metadata={"format": "pt"}))


def read_adapter(
    folder_or_repo: str | os.PathLike[str], **hub_options: Any
) -> tuple[MemoryConfig, AdapterCard, dict[str, Tensor]]:
    """Read what `write_adapter` wrote, from a folder or, where there is no such folder, from the Hub.

    Raises:
        AdapterFormatError: A file is missing, damaged, or of a newer format.
    """
    folder = Path(folder_or_repo)
    if not folder.is_dir():
        name = str(folder_or_repo)
        if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
            raise AdapterFormatError(f"there is no folder {name}, and it is not a Hub id such as 'user/adapter'")
        folder = Path(snapshot_download(name, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME], **hub_options))
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise AdapterFormatError(f"{folder_or_repo} has no {name}; it is not an adapter that save_pretrained wrote")
    config, card = _parse_config((folder / CONFIG_NAME).read_bytes())
    try:
        tensors = load((folder / WEIGHTS_NAME).read_bytes())
    except (SafetensorError, ValueError) as error:
        raise AdapterFormatError(f"{folder_or_repo}/{WEIGHTS_NAME} is not a safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise AdapterFormatError(f"{folder_or_repo}/{WEIGHTS_NAME}: {key} is not finite floating point")
    return config, card, tensors


def _parse_config(data: bytes) -> tuple[MemoryConfig, AdapterCard]:
    try:
        content = json.loads(data)
    except ValueError as error:
        raise AdapterFormatError(f"{CONFIG_NAME} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("library_name") != "mal_adapter":
        raise AdapterFormatError(f"{CONFIG_NAME} does not describe a mal_adapter adapter")
    if content.get("format_version") != FORMAT_VERSION:
        raise AdapterFormatError(
            f"{CONFIG_NAME} has format_version {content.get('format_version')!r}, this version reads {FORMAT_VERSION}; "
            "a newer mal-adapter may read it"
        )
    if not isinstance(content.get("memory"), dict):
        raise AdapterFormatError(f"{CONFIG_NAME} has no memory configuration")
    try:
        config = MemoryConfig.from_dict(content["memory"])
    except ConfigError as error:
        raise AdapterFormatError(f"{CONFIG_NAME}: {error}") from error
    card = {field.name: content.get(field.name) for field in dataclasses.fields(AdapterCard)}
    for name, kind in _CARD_TYPES.items():
        if card[name] is not None and type(card[name]) is not kind:
            raise AdapterFormatError(f"{CONFIG_NAME}: {name} is {card[name]!r}, expected {kind.__name__}")
    return config, AdapterCard(**card)


_CARD_TYPES: dict[str, type] = {
    "layer_idx": int,
    "base_model_name_or_path": str,
    "model_type": str,
    "hidden_size": int,
    "num_hidden_layers": int,
    "task": dict,
}


def _model_card(config: MemoryConfig, card: AdapterCard) -> str:
    base = f"base_model: {card.base_model_name_or_path}\n" if card.base_model_name_or_path else ""
    host = card.base_model_name_or_path or "an audio language model"
    task = f"\nLabels: {', '.join(card.task['labels'])}.\n" if card.task and card.task.get("labels") else ""
    return f"""---
library_name: mal_adapter
pipeline_tag: audio-classification
tags: [speech-emotion-recognition, test-time-memory, titans]
{base}---

# A dialogue memory for {host}

A [mal_adapter](https://pypi.org/project/mal-adapter/) memory for decoder layer {card.layer_idx}: width
{config.memory_dim}, {config.num_heads} heads, depth {config.depth}.
{task}
```python
from mal_adapter import attach_memory

memory = attach_memory(model, adapter="<this repository or folder>")
with memory.session("a dialogue"):
    model.generate(**inputs)
```
"""
