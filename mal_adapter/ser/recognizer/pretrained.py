"""The host of a trained adapter: its name, its weights, and the LoRA that was trained beside the adapter."""

import os
from pathlib import Path
from typing import Any

import torch

from mal_adapter.errors import ConfigError, HostError
from mal_adapter.extras import explain_missing
from mal_adapter.memory.adapter import MemoryAdapter
from mal_adapter.memory.ensemble import AnyAdapter, MemoryEnsemble
from mal_adapter.ser.loading import load_host
from mal_adapter.serialization.metadata import AdapterMetadata

__all__ = ["check_pair", "find_host", "load_host_of", "load_named_host", "with_lora"]

LORA_NAME = "lora"


def find_host(metadata: AdapterMetadata, adapter_folder: object) -> str | None:
    """The folder or Hub id of an adapter's host.

    Args:
        metadata: The adapter's.
        adapter_folder: Where the adapter was loaded from; anything but a path for an adapter that is in memory.

    Returns:
        The name in `metadata`, or None. A relative path that does not exist in the working directory is looked up
        beside the adapter's folder.

    Example:
        >>> from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER
        >>> find_host(AdapterMetadata(base_model_name_or_path="host"), ADAPTER_FOLDER) == str(HOST_FOLDER)
        True
        >>> find_host(AdapterMetadata(base_model_name_or_path="Qwen/Qwen2-Audio-7B"), ADAPTER_FOLDER)
        'Qwen/Qwen2-Audio-7B'
    """
    name = metadata.base_model_name_or_path
    if name and isinstance(adapter_folder, (str, os.PathLike)) and not os.path.exists(name):
        beside = os.path.join(os.path.dirname(os.path.abspath(adapter_folder)), name)
        if os.path.isfile(os.path.join(beside, "config.json")):
            return beside
    return name


def load_named_host(
    name: str | os.PathLike[str], *, device: str | torch.device | None = None, dtype: Any = "auto", **kwargs: Any
) -> tuple[Any, Any]:
    """`load_host` with one typed error for every reason why a host can't be loaded.

    Args:
        name: A folder or a Hub id.
        device: As for `load_host`.
        dtype: Of the weights; "auto" is the checkpoint's.
        **kwargs: As for `load_host`.

    Returns:
        (model, processor), the model in eval mode.

    Raises:
        HostError: There is no such folder or Hub model, or transformers can't load it.
        MissingDependencyError: `device_map` is given, but accelerate is not installed.

    Example:
        >>> load_named_host("./models/no-such-host")
        Traceback (most recent call last):
        mal_adapter.errors.HostError: the model ./models/no-such-host can't be loaded: the folder does not exist, ...
    """
    name = os.fspath(name)
    try:
        return load_host(name, device=device, dtype=dtype, **kwargs)
    except (OSError, ValueError) as error:
        raise HostError(f"the model {name} can't be loaded: {_reason(name, error)}") from error


def with_lora(model: Any, adapter_folder: str | os.PathLike[str]) -> Any:
    """The model with the LoRA that `train_memory` saved beside an adapter.

    What is mutated: PEFT puts its layers into `model`.

    Args:
        model: The host. One that has PEFT's layers already is returned as it is.
        adapter_folder: The adapter's folder; without a subfolder `lora`, or for a Hub id, `model` is returned as it is.

    Raises:
        HostError: The LoRA does not fit the host or is damaged.
        MissingDependencyError: peft is not installed.
    """
    folder = Path(adapter_folder) / LORA_NAME
    has_peft = hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)
    if has_peft or not (folder / "adapter_config.json").is_file():
        return model
    with explain_missing(f"the LoRA in {folder}", extra="train"):
        from peft import PeftModel
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # peft, torch and safetensors each raise their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HostError(
            f"the LoRA in {folder} can't be loaded into this host: {reason}; load the host that the adapter was "
            "trained on, or train again"
        ) from error


def _reason(name: str, error: Exception) -> str:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        return "the folder does not exist, and this is not a Hub id such as Qwen/Qwen2-Audio-7B-Instruct"
    offline = "; HF_HUB_OFFLINE is set, so the Hub was not asked" if HF_HUB_OFFLINE and not Path(name).exists() else ""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0]}{offline}"


def check_pair(pair: tuple[Any, ...], options: list[str]) -> None:
    """Raise `ConfigError` unless this is a loaded (model, processor), and no options for loading are given with it."""
    if len(pair) != 2 or not hasattr(pair[0], "parameters"):
        given = ", ".join(type(item).__name__ for item in pair)
        raise ConfigError(f"model is the tuple ({given}), expected (model, processor) as load_host returns it")
    if options:
        raise ConfigError(f"{', '.join(options)}: only for a host that is loaded here, but model is loaded already")


def load_host_of(
    adapter: AnyAdapter, source: object, model: str | os.PathLike[str] | None, options: dict[str, Any]
) -> tuple[Any, Any]:
    """(model, processor) by the given name, else by the one in the adapter."""
    place = "this adapter" if isinstance(source, MemoryAdapter | MemoryEnsemble) else f"the adapter {source}"
    advice = "pass model=, a folder, a Hub id or a loaded (model, processor)"
    name = find_host(adapter.metadata, source) if model is None else model
    if not name:
        raise HostError(f"{place} does not name its host; {advice}")
    try:
        return load_named_host(name, **options)
    except HostError as error:
        if model is not None:
            raise
        raise HostError(f"{error}; {place} names it as its host: {advice}") from error.__cause__
