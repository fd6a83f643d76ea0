"""Loading a host and its processor from a folder or the Hub."""

from typing import Any

import torch

from mal_adapter.extras import require

__all__ = ["load_host"]

_FILES = ("revision", "token", "cache_dir", "subfolder", "local_files_only")


def load_host(name: str, *, device: str | torch.device | None = None, **kwargs: Any) -> tuple[Any, Any]:
    """Load an audio language model and its processor with transformers.

    The class is the one that the checkpoint's config names. Of the Omni models, which also speak, only the thinker is
    loaded. The dtype is the checkpoint's unless given. Code in the checkpoint is never run.

    Args:
        name: A folder or a Hub id.
        device: Where the model goes; the first CUDA device if there is one, else the CPU.
        **kwargs: For the model's `from_pretrained`, such as `dtype="float32"` or `device_map="auto"`, which replaces
            `device`. Options that choose files (`revision`, `token`, `cache_dir`, `subfolder`, `local_files_only`) are
            also used for its config and processor.

    Returns:
        (model, processor), the model in eval mode.

    Raises:
        OSError: There is no such folder or Hub model.
        ValueError: transformers does not support the model.
        MissingDependencyError: `device_map` is given, but accelerate is not installed.
    """
    import transformers

    files = {option: value for option, value in kwargs.items() if option in _FILES}
    if kwargs.get("device_map") is not None:
        require("device_map", "accelerate", extra="train")
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **files)
    architecture = (getattr(config, "architectures", None) or [""])[0]
    model_class = getattr(transformers, architecture.replace("OmniMoeForC", "OmniMoeThinkerForC"), None)
    if config.model_type == "qwen2_5_omni":  # its checkpoints name a class that no longer exists
        model_class = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    if model_class is None:  # AutoModelForMultimodalLM is new in transformers 5
        auto = getattr(transformers, "AutoModelForMultimodalLM", transformers.AutoModelForImageTextToText)
        model_class = auto if type(config) in auto._model_mapping else transformers.AutoModelForCausalLM
    processor = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=False, **files)
    model = model_class.from_pretrained(name, **{"dtype": "auto", **kwargs}).eval()
    if device is None and torch.cuda.is_available():
        device = "cuda"
    if device is not None and "device_map" not in kwargs:
        model = model.to(device)
    return model, processor
