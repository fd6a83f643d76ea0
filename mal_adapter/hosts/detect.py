"""What a model tells of itself: its decoder layers, their width, the placeholder, the module that merges audio."""

import dataclasses
import inspect
import warnings
from typing import Any

from torch import nn

from mal_adapter.errors import HostError, IgnoredHookWarning
from mal_adapter.hosts.registry import REGISTRY
from mal_adapter.hosts.spec import HostSpec

__all__ = ["FEATURE_ARGUMENTS", "count_shared_layers", "detect_host", "unwrap", "warn_if_compiled"]

FEATURE_ARGUMENTS = ("input_features", "audio_input_features", "input_values", "audio_values", "audio_input_ids")
"""What the audio argument of `forward` is called in the families of transformers."""


def unwrap(model: nn.Module) -> nn.Module:
    """The host inside PEFT, torch.compile, DDP or FSDP wrappers and inside an omni model's `.thinker`.

    Raises:
        HostError: `model` is no module, such as a checkpoint's name or a processor.
    """
    given: object = model
    if not isinstance(given, nn.Module):
        shown = repr(given) if isinstance(given, str) else type(given).__name__
        raise HostError(f"the model is {shown}, not a torch module; load it first, with its class's from_pretrained")
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            model = model.get_base_model()  # type: ignore[operator]
        elif type(model).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"):
            model = model.module  # type: ignore[assignment]
        elif isinstance(thinker := getattr(model, "thinker", None), nn.Module):
            model = thinker
        else:
            return model


def detect_host(model: nn.Module, spec: HostSpec | None = None) -> HostSpec:
    """Complete `spec` for an unwrapped `model` by its structure, its config and the registry.

    Raises:
        HostError: The decoder layers or their width can't be determined; the message lists what was found.
    """
    config = getattr(model, "config", None)
    known = REGISTRY.get(getattr(config, "model_type", None) or "", HostSpec())
    given = {field.name: getattr(spec, field.name, None) for field in dataclasses.fields(HostSpec)}
    told = HostSpec(**{name: getattr(known, name) if value is None else value for name, value in given.items()})

    layers = _find_layers(model, config) if told.layers is None else told.layers
    try:
        module = model.get_submodule(layers)
    except AttributeError as error:
        raise HostError(f"HostSpec.layers={layers!r}: {error}; the model has {_module_lists(model)}") from error
    if not isinstance(module, nn.ModuleList) or len(module) == 0:
        raise HostError(f"{layers!r} is {type(module).__name__}, not a ModuleList of decoder layers")

    hidden_size = told.hidden_size or _find_hidden_size(model, layers)
    if hidden_size is None:
        raise HostError(
            f"the width of {type(model).__name__}'s decoder layers is not in its config; pass "
            f"host=HostSpec(layers={layers!r}, hidden_size=...)"
        )
    features = told.feature_arguments or FEATURE_ARGUMENTS
    mask_module = _find_mask_module(model, layers, features) if told.mask_module is None else told.mask_module
    audio_token_id = _find_audio_token_id(config) if told.audio_token_id is None else told.audio_token_id
    return dataclasses.replace(
        told,
        layers=layers,
        hidden_size=hidden_size,
        audio_token_id=audio_token_id,
        mask_module=mask_module,
        feature_arguments=features,
    )


def count_shared_layers(model: nn.Module) -> int:
    """How many of the last decoder layers reuse the keys and values of earlier ones, so that what is added there
    reaches no other position."""
    return getattr(_text_config(getattr(model, "config", None)), "num_kv_shared_layers", None) or 0


def warn_if_compiled(model: nn.Module, layer: nn.Module) -> None:
    """Warn if `model` or something in it is compiled around `layer`: hooks inside of what has been traced are ignored.
    What is compiled inside the layer, or as the layer, runs inside its hooks."""
    compiled = [module for module in model.modules() if module is not layer and _is_compiled(module)]
    around = [type(module).__name__ for module in compiled if any(inner is layer for inner in module.modules())]
    if around:
        warnings.warn(
            f"{around[0]}, which holds the hooked layer, is compiled already. If it has been called, torch.compile "
            "ignores the memory: call attach_memory first, or torch.compiler.reset() now",
            IgnoredHookWarning,
            stacklevel=3,
        )


def _is_compiled(module: nn.Module) -> bool:
    forward = vars(module).get("forward")  # compiled by itself: module.forward = torch.compile(module.forward)
    return (
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(forward, "_torchdynamo_orig_callable")
    )


def _find_layers(model: nn.Module, config: Any) -> str:
    count = getattr(_text_config(config), "num_hidden_layers", None)
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        embeddings = None
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            parent = model.get_submodule(path.rpartition(".")[0])
            if any(m is embeddings for m in parent.modules()):
                found.append(path)
    if not found:
        raise HostError(
            f"found no decoder layers in {type(model).__name__}: looked for a ModuleList of length {count} "
            f"(config.num_hidden_layers) beside the input embeddings; the model has {_module_lists(model)}. "
            'Pass host=HostSpec(layers="path.to.layers", hidden_size=...)'
        )
    shortest: str = min(found, key=lambda path: path.count("."))
    return shortest


def _find_hidden_size(model: nn.Module, layers: str) -> int | None:
    """The width in the model's config, or else in that of the innermost module around the layers."""
    parents = [layers.rsplit(".", depth)[0] for depth in range(1, layers.count(".") + 1)]
    for path in ("", *parents):
        config = _text_config(getattr(model.get_submodule(path), "config", None))
        if isinstance(size := getattr(config, "hidden_size", None), int):
            return size
    return None


def _find_mask_module(model: nn.Module, layers: str, features: tuple[str, ...]) -> str:
    """The innermost module around the layers whose forward takes ids and features; the model unless there is one."""
    path = layers
    while path:
        path = path.rpartition(".")[0]
        parameters = inspect.signature(model.get_submodule(path).forward).parameters
        if "input_ids" in parameters and any(name in parameters for name in features):
            break
    return path


def _find_audio_token_id(config: Any) -> int | None:
    for owner, name in ((config, "audio_token_id"), (config, "audio_token_index")):
        if isinstance(value := getattr(owner, name, None), int):
            return value
    value = getattr(getattr(config, "audio_config", None), "audio_token_id", None)
    return value if isinstance(value, int) else None


def _text_config(config: Any) -> Any:
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _module_lists(model: nn.Module) -> str:
    lists = [f"{path} ({len(m)})" for path, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    return "the ModuleLists " + ", ".join(lists) if lists else "no ModuleList"
