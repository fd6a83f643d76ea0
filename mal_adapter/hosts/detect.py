"""Find decoder layers, width, placeholder id and the module that merges audio."""

import dataclasses
import inspect
import warnings
from typing import Any

from torch import nn

from mal_adapter.errors import HostError, IgnoredHookWarning
from mal_adapter.hosts.registry import REGISTRY
from mal_adapter.hosts.spec import HostSpec

__all__ = [
    "FEATURE_ARGUMENTS",
    "complete_from_registry",
    "count_shared_layers",
    "find_audio_token_id",
    "find_hidden_size",
    "find_layers",
    "find_mask_module",
    "unwrap",
    "warn_if_compiled",
]

FEATURE_ARGUMENTS = ("input_features", "audio_input_features", "input_values", "audio_values", "audio_input_ids")
"""What the audio argument of `forward` is called in the families of transformers."""


def unwrap(model: nn.Module) -> nn.Module:
    """The host inside PEFT, torch.compile, DDP or FSDP wrappers and inside an omni model's `.thinker`.

    Raises:
        HostError: `model` is not a module but, for example, a checkpoint's name or a processor.
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


def complete_from_registry(model: nn.Module, spec: HostSpec | None) -> HostSpec:
    """The fields of `spec`, and those of the registry for this type of model where `spec` leaves them open."""
    known = REGISTRY.get(getattr(getattr(model, "config", None), "model_type", None) or "", HostSpec())
    given = {field.name: getattr(spec, field.name, None) for field in dataclasses.fields(HostSpec)}
    return HostSpec(**{name: getattr(known, name) if value is None else value for name, value in given.items()})


def find_layers(model: nn.Module, path: str | None) -> tuple[str, nn.ModuleList]:
    """The path of the decoder layers and the layers themselves.

    Args:
        model: The unwrapped host.
        path: Where they are; None searches for them.

    Raises:
        HostError: There are none; the message lists the model's module lists.
    """
    if path is None:
        path = _search_layers(model)
    try:
        layers = model.get_submodule(path)
    except AttributeError as error:
        raise HostError(f"HostSpec.layers={path!r}: {error}; the model has {_module_lists(model)}") from error
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise HostError(f"{path!r} is {type(layers).__name__}, not a ModuleList of decoder layers")
    return path, layers


def count_shared_layers(model: nn.Module) -> int:
    """How many of the last decoder layers reuse the keys and values of earlier ones, so that what is added there
    reaches no other position."""
    return getattr(_text_config(getattr(model, "config", None)), "num_kv_shared_layers", None) or 0


def warn_if_compiled(model: nn.Module, layer: nn.Module) -> None:
    """Warn if `model` or something in it is compiled around `layer`: what was traced before has no hooks, and is not
    traced again for them. What is compiled inside the layer, or as the layer, runs inside its hooks."""
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


def _search_layers(model: nn.Module) -> str:
    count = getattr(_text_config(getattr(model, "config", None)), "num_hidden_layers", None)
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


def find_hidden_size(model: nn.Module, layers: str) -> int:
    """The width in the model's config, or else in that of the innermost module around the layers.

    Raises:
        HostError: No config has it.
    """
    parents = [layers.rsplit(".", depth)[0] for depth in range(1, layers.count(".") + 1)]
    for path in ("", *parents):
        config = _text_config(getattr(model.get_submodule(path), "config", None))
        if isinstance(size := getattr(config, "hidden_size", None), int):
            return size
    raise HostError(
        f"the width of {type(model).__name__}'s decoder layers is not in its config; pass "
        f"host=HostSpec(layers={layers!r}, hidden_size=...)"
    )


def find_mask_module(model: nn.Module, layers: str, features: tuple[str, ...]) -> str:
    """The innermost module around the layers whose forward takes ids and features; the model unless there is one."""
    path = layers
    while path:
        path = path.rpartition(".")[0]
        parameters = inspect.signature(model.get_submodule(path).forward).parameters
        if "input_ids" in parameters and any(name in parameters for name in features):
            break
    return path


def find_audio_token_id(model: nn.Module) -> int | None:
    """The placeholder id of audio in the model's config; None if there is none."""
    config = getattr(model, "config", None)
    inner = getattr(config, "audio_config", None)
    for owner, name in ((config, "audio_token_id"), (config, "audio_token_index"), (inner, "audio_token_id")):
        if isinstance(value := getattr(owner, name, None), int):
            return value
    return None


def _text_config(config: Any) -> Any:
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _module_lists(model: nn.Module) -> str:
    lists = [f"{path} ({len(m)})" for path, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    return "the ModuleLists " + ", ".join(lists) if lists else "no ModuleList"
