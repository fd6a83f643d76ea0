"""The host of a trained adapter: its name, its weights, and the LoRA that was trained beside the adapter."""

import os
from pathlib import Path
from typing import Any

import torch

from mal_adapter.errors import HostError
from mal_adapter.ser.loading import load_host

__all__ = ["load_named_host", "with_lora"]

LORA_NAME = "lora"


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

    Example:
        >>> load_named_host("./models/no-such-host")
        Traceback (most recent call last):
        mal_adapter.errors.HostError: the model ./models/no-such-host can not be loaded: there is no such folder, ...
    """
    name = os.fspath(name)
    try:
        return load_host(name, device=device, dtype=dtype, **kwargs)
    except (OSError, ValueError) as error:
        raise HostError(f"the model {name} can not be loaded: {_reason(name, error)}") from error


def with_lora(model: Any, adapter_folder: str | os.PathLike[str]) -> Any:
    """The model with the LoRA that `train_memory` saved beside an adapter.

    What is mutated: PEFT puts its layers into `model`.

    Args:
        model: The host. One that has PEFT's layers already is returned as it is.
        adapter_folder: The adapter's folder; without a subfolder `lora`, or for a Hub id, `model` is returned as it is.

    Raises:
        HostError: Peft is not installed, or the LoRA does not fit the host or is damaged.
    """
    folder = Path(adapter_folder) / LORA_NAME
    has_peft = hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)
    if has_peft or not (folder / "adapter_config.json").is_file():
        return model
    try:
        from peft import PeftModel
    except ImportError as error:
        raise HostError(f"{folder} is a LoRA, which needs peft: pip install 'mal-adapter[train]'") from error
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # peft, torch and safetensors each raise their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HostError(
            f"the LoRA in {folder} can not be loaded into this host: {reason}; load the host that the adapter was "
            "trained on, or train again"
        ) from error


def _reason(name: str, error: Exception) -> str:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        return "there is no such folder, and this is no Hub id such as Qwen/Qwen2-Audio-7B-Instruct"
    offline = "; HF_HUB_OFFLINE is set, so the Hub was not asked" if HF_HUB_OFFLINE and not Path(name).exists() else ""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0]}{offline}"
