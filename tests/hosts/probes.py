"""Tools of the tests: random adapters, a trace of the decoder layers, bitwise comparison, a list of all hooks."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mal_adapter import MemoryAdapter, MemoryConfig, MemoryState
from tests.hosts.tiny import WIDTH

__all__ = [
    "LayerCall",
    "assert_states_close",
    "changing",
    "hook_census",
    "random_adapter",
    "same_bits",
    "small_config",
    "state_bytes",
    "trace_layers",
]


def small_config(width: int = WIDTH, **changes: Any) -> MemoryConfig:
    """A memory that takes visible steps and needs several chunks per utterance."""
    return MemoryConfig(
        **{"hidden_size": width, "memory_dim": 16, "num_heads": 2, "chunk_size": 4, "step_bias": -1.0, **changes}
    )


def random_adapter(width: int = WIDTH, seed: int = 0, **changes: Any) -> MemoryAdapter:
    """An adapter whose every parameter, the zero-initialised ones too, is random, so that its residual is as large as a
    layer's own contribution and depends on the state."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        adapter = MemoryAdapter(small_config(width, **changes))
        for name, parameter in adapter.named_parameters():
            # Gate logits keep their starting points, because the noise is added to them.
            spread = parameter.shape[-1] ** -0.5 if parameter.dim() >= 2 else 0.2
            parameter.add_(torch.randn_like(parameter) * spread)
            if name.startswith("readout_out"):
                parameter.mul_(2)
    return adapter.eval()


@dataclass
class LayerCall:
    """One call of one decoder layer, recorded by hooks that run after all others."""

    layer_idx: int
    hidden_in: Tensor
    hidden_out: Tensor
    surroundings: dict[str, Any] = field(default_factory=dict)  # masks, positions, cache lengths


@contextlib.contextmanager
def trace_layers(layers: nn.ModuleList, stream_idx: int | None = None) -> Iterator[list[LayerCall]]:
    """Record each call of each layer. If entered after `attach_memory`, it records what the next layer gets. It records
    one of parallel streams of hidden states."""
    calls: list[LayerCall] = []
    pending: dict[int, dict[str, Any]] = {}

    def stream(hidden_states: Tensor) -> Tensor:
        return hidden_states.clone() if stream_idx is None else hidden_states[stream_idx].clone()

    def before(index: int):
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cache = kwargs.get("past_key_values")
            positions = kwargs.get("position_embeddings")
            pending[index] = {
                "hidden_shape": tuple(args[0].shape),
                "attention_mask": kwargs.get("attention_mask"),
                "position_ids": kwargs.get("position_ids"),
                "cos": positions and positions[0],
                "sin": positions and positions[1],
                "cache_length_before": _cache_length(cache, index),
            }

        return hook

    def after(index: int):
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            cache = kwargs.get("past_key_values")
            surroundings = pending.pop(index)
            surroundings["cache_length_after"] = _cache_length(cache, index)
            hidden_out = out[0] if isinstance(out, tuple) else out
            calls.append(LayerCall(index, stream(args[0]), stream(hidden_out), surroundings))

        return hook

    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_pre_hook(before(index), with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(after(index), with_kwargs=True).remove)
        yield calls


def changing(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A forward hook that changes a layer's hidden states, the first of a tuple in transformers 4.57."""

    def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    return hook


def _cache_length(cache: Any, layer_idx: int) -> int | None:
    if cache is None:
        return None
    try:
        return cache.get_seq_length(layer_idx)
    except ValueError:  # a Mamba or MoE layer keeps no keys: the cache's length is that of its attention layers
        return cache.get_seq_length()


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Any, b: Any) -> bool:
    """Whether both have the same bits: -0.0 is not 0.0, and a NaN equals its copy. Other values are compared by ==."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        integers = _INTEGERS[a.element_size()]
        return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))
    return type(a) is type(b) and a == b


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    """Every key of the `state_dict` with its tensor's bytes."""
    return {
        name: tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }


def hook_census(model: nn.Module) -> dict[str, Any]:
    """All hooks of all modules and all attributes set on instances: equal before attach and after detach."""

    def attributes(module: nn.Module) -> dict[str, int | None]:
        return {k: len(v) if "hook" in k and isinstance(v, dict) else None for k, v in vars(module).items()}

    return {name: attributes(module) for name, module in model.named_modules()}


def assert_states_close(a: MemoryState, b: MemoryState, tolerance: float = 1e-5) -> None:
    """Equal counters, and fast weights and momentum equal within `tolerance` of their largest entry."""
    for counter in ("utterances", "tokens", "skipped_writes"):
        assert torch.equal(getattr(a, counter), getattr(b, counter)), counter
    for x, y in zip((*a.weights, *a.momentum), (*b.weights, *b.momentum), strict=True):
        assert x.dtype == y.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance * max(1.0, float(y.abs().max())))
