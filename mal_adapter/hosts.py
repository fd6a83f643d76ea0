"""Where a host keeps its decoder layers, and which positions of a call are audio: detected, or told by a `HostSpec`."""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from mal_adapter.errors import AudioMaskError, HostError, IgnoredHookWarning

__all__ = ["HostSpec", "bind_call", "detect_host", "find_audio_mask", "find_features", "register_host", "unwrap"]

FEATURE_ARGUMENTS = ("input_features", "audio_input_features", "input_values", "audio_values", "audio_input_ids")
"""What the audio argument of `forward` is called in the families of transformers."""


@dataclasses.dataclass(frozen=True)
class HostSpec:
    """Where the decoder layers are and how audio positions are found; None means: detect it.

    Args:
        layers: Dotted path of the `ModuleList` of decoder layers, from the model without its PEFT or compile wrapper.
        hidden_size: Width of the hidden states between those layers.
        audio_token_id: The placeholder id that stands at each audio position of `input_ids`.
        mask_module: Dotted path of the module whose call carries `input_ids` and the audio features; "" is the model.
        feature_arguments: Names of that call's audio features. Only a call that has one of them carries audio.
        audio_mask: Replaces the comparison with `audio_token_id`: called with the call's arguments by name, it
            returns a (batch, seq_len) bool mask, or None for a call without audio. A module-level function, so that
            the model can be pickled.

    A host without ids at all, such as a plain `nn.Module`, needs only `layers` and `hidden_size`; pass the mask to
    `AttachedMemory.session(audio_mask=...)`.

    Example:
        >>> spec = HostSpec(layers="blocks", hidden_size=8)
        >>> spec.audio_token_id is None
        True
    """

    layers: str | None = None
    hidden_size: int | None = None
    audio_token_id: int | None = None
    mask_module: str | None = None
    feature_arguments: tuple[str, ...] | None = None
    audio_mask: Callable[[Mapping[str, Any]], Tensor | None] | None = None


_REGISTRY: dict[str, HostSpec] = {}


def register_host(model_type: str, spec: HostSpec) -> None:
    """Tell how hosts of `config.model_type` look where detection does not find it; a user's own `HostSpec` goes first.

    Example:
        >>> register_host("my_remote_code_model", HostSpec(layers="llm.model.layers", audio_token_id=7))
    """
    _REGISTRY[model_type] = spec


def unwrap(model: nn.Module) -> nn.Module:
    """The host inside PEFT, torch.compile, DDP or FSDP wrappers and inside an omni model's `.thinker`."""
    while True:
        if hasattr(model, "_orig_mod"):
            _warn_compiled()
            model = model._orig_mod  # type: ignore[assignment]
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            model = model.get_base_model()  # type: ignore[operator]
        elif type(model).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"):
            model = model.module  # type: ignore[assignment]
        elif isinstance(thinker := getattr(model, "thinker", None), nn.Module):
            model = thinker
        else:
            if getattr(model, "_compiled_call_impl", None) is not None:
                _warn_compiled()
            return model


def detect_host(model: nn.Module, spec: HostSpec | None = None) -> HostSpec:
    """Complete `spec` for an unwrapped `model` by its structure, its config and the registry.

    Raises:
        HostError: The decoder layers or their width can't be determined; the message lists what was found.
    """
    config = getattr(model, "config", None)
    known = _REGISTRY.get(getattr(config, "model_type", None) or "", HostSpec())
    given = {field.name: getattr(spec, field.name, None) for field in dataclasses.fields(HostSpec)}
    told = HostSpec(**{name: getattr(known, name) if value is None else value for name, value in given.items()})

    layers = _find_layers(model, config) if told.layers is None else told.layers
    try:
        module = model.get_submodule(layers)
    except AttributeError as error:
        raise HostError(f"HostSpec.layers={layers!r}: {error}; the model has {_module_lists(model)}") from error
    if not isinstance(module, nn.ModuleList) or len(module) == 0:
        raise HostError(f"{layers!r} is {type(module).__name__}, not a ModuleList of decoder layers")

    hidden_size = told.hidden_size or getattr(_text_config(config), "hidden_size", None)
    if hidden_size is None:
        raise HostError(
            f"the width of {type(model).__name__}'s decoder layers is not in its config; pass "
            f"host=HostSpec(layers={layers!r}, hidden_size=...)"
        )
    features = told.feature_arguments or FEATURE_ARGUMENTS
    mask_module = _find_mask_module(model, layers, features) if told.mask_module is None else told.mask_module
    audio_token_id = _find_audio_token_id(config) if told.audio_token_id is None else told.audio_token_id
    return HostSpec(layers, hidden_size, audio_token_id, mask_module, features, told.audio_mask)


def bind_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module` by name, those in `**kwargs` included."""
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind_partial(*args, **kwargs)
    except TypeError:
        return dict(kwargs)  # forward itself is about to raise, with its own message
    call = dict(bound.arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            call |= call.pop(parameter.name, {})
    return call


def find_features(host: HostSpec, call: Mapping[str, Any]) -> Tensor | None:
    """The audio features of a call, or None for a call without audio."""
    return next((call[name] for name in host.feature_arguments or () if call.get(name) is not None), None)


def find_audio_mask(host: HostSpec, call: Mapping[str, Any]) -> Tensor | None:
    """Which positions of a call are audio: (batch, seq_len) bool, or None for a call without audio.

    Raises:
        AudioMaskError: The call carries audio, but nothing tells where.
    """
    if host.audio_mask is not None:
        return host.audio_mask(call)
    if find_features(host, call) is None:
        return None
    ids = call.get("input_ids")
    if ids is None:
        raise AudioMaskError(
            "audio features came with inputs_embeds and without input_ids, so the audio positions are unknown; "
            "pass session(..., audio_mask=...) with a (batch, seq_len) bool mask"
        )
    if host.audio_token_id is None:
        raise AudioMaskError(
            "the host's config names no placeholder id for audio; pass host=HostSpec(audio_token_id=...) to "
            "attach_memory, or session(..., audio_mask=...)"
        )
    return ids == host.audio_token_id  # type: ignore[no-any-return]


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


def _warn_compiled() -> None:
    warnings.warn(
        "the model is compiled already; torch.compile ignores hooks that are registered after its first call. "
        "Call attach_memory first, then torch.compile.",
        IgnoredHookWarning,
        stacklevel=4,
    )
