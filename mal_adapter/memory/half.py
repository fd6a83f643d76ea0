"""The projections of an adapter in its host's half precision, for inference on a GPU.

Weights are cast once. What LayerNorm multiplies and adds is folded into the projection behind it, so that each weight
is rounded once. Sums, states, gates, norms and the lengths of keys and queries stay in float32.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mal_adapter.memory.precision import full_precision
from mal_adapter.memory.projections import Layers, Seen
from mal_adapter.memory.spans import Spans

__all__ = ["HalfCache", "HalfProjections", "versions"]

Tokens = Float[Tensor, "tokens hidden_size"]
Valid = Bool[Tensor, " tokens"]

_HALF = (torch.bfloat16, torch.float16)


class HalfProjections:
    """The cast weights of one adapter and what is computed with them: `Projections` without derivatives.

    Args:
        layers: The adapter's.
        dtype: Of the weights.
    """

    def __init__(self, layers: Layers, dtype: torch.dtype) -> None:
        norm, in_proj, pool_proj, readout_norm, readout_in, _, readout_out = layers
        self._eps, self._readout_eps = norm.eps, readout_norm.eps
        self._in, self._bias = _fold(in_proj, norm, dtype)
        self._pool = None
        if pool_proj is not None:
            self._pool, pool_bias = _fold(pool_proj, norm, dtype)
            self._bias = self._bias + pool_bias
        self._readout_in, readout_bias = _fold(readout_in, readout_norm, dtype)
        self._readout_bias = readout_bias.to(dtype)
        self._readout_out = readout_out.weight.to(dtype)

    def project(
        self, tokens: Tokens, spans: Spans, valid: Valid | None, causal: bool, rows: slice
    ) -> Float[Tensor, "tokens rows"]:
        """See `Projections`. Returns float32."""
        with full_precision(tokens.device):
            return self._project(tokens, spans, valid, causal, rows)

    def _project(
        self, tokens: Tokens, spans: Spans, valid: Valid | None, causal: bool, rows: slice
    ) -> Float[Tensor, "tokens rows"]:
        if valid is not None:
            tokens = torch.where(valid[:, None], tokens, 0)
        x = F.layer_norm(tokens, tokens.shape[-1:], eps=self._eps)
        weight, bias = self._in[rows], self._bias[rows]
        if self._pool is None:
            return _linear(x, weight, bias)
        pool = self._pool[rows]
        if causal:
            return _linear(x, weight, bias).add_(_linear(_running_means(x, spans, valid), pool))
        mean = spans.pad(x).mean(1) if valid is None and spans.equal else _means(x, spans, valid)
        return spans.add_rows_(_linear(x, weight), _linear(mean, pool, bias))

    def read_out(self, answer: Float[Tensor, "tokens memory_dim"], token: Seen, valid: Valid | None) -> Tokens:
        """See `Projections`. Returns half precision."""
        with full_precision(token.device):
            evidence = torch.cat((answer, token), dim=-1)
            evidence = F.layer_norm(evidence, evidence.shape[-1:], eps=self._readout_eps)
            gated = F.linear(evidence.to(self._readout_in.dtype), self._readout_in, self._readout_bias)
            value, gate = gated.chunk(2, dim=-1)
            inner = value * F.silu(gate)
            if valid is not None:
                inner = torch.where(valid[:, None], inner, 0)
            return F.linear(inner, self._readout_out)


class HalfCache:
    """The `HalfProjections` of one adapter, until a parameter changes. A copied or pickled cache is empty."""

    devices = ("cuda",)
    """Where they are used. Processors may have no units for half precision."""

    def __init__(self) -> None:
        self._key: object = None
        self._cast: HalfProjections | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return HalfCache, ()

    def drop(self) -> None:
        """Forget the cast weights."""
        self._key = self._cast = None

    def takes(self, tokens: Tokens) -> bool:
        """Whether these tokens are projected in their own half precision: where no gradient is recorded."""
        return tokens.dtype in _HALF and tokens.device.type in self.devices and not torch.is_grad_enabled()

    def get(self, adapter: nn.Module, layers: Layers, dtype: torch.dtype) -> HalfProjections:
        """The projections of `adapter` in `dtype`. They are cast again after any change of its parameters."""
        key, cast = (versions(adapter), dtype), self._cast
        if cast is None or self._key != key:
            # Tensors that are made in inference mode could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad(), full_precision(layers.in_proj.weight.device):
                cast = HalfProjections(layers, dtype)
            self._key, self._cast = key, cast
        return cast


def versions(module: nn.Module) -> list[tuple[Any, ...]]:
    """What differs once a parameter of `module` has changed, moved or been replaced; nothing is read from the device.
    An inference tensor's changes are not counted by torch."""
    return [(p.data_ptr(), None if p.is_inference() else p._version, p.dtype) for p in _parameters(module)]


def _parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """As `module.parameters()`, which takes three times as long: it also makes names."""
    yield from (p for p in module._parameters.values() if p is not None)
    for child in module._modules.values():
        if child is not None:
            yield from _parameters(child)


def _fold(linear: nn.Linear, norm: nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias of `linear` behind a `norm` that neither multiplies nor adds; the bias in float32."""
    weight = linear.weight.float()
    bias = F.linear(norm.bias.float(), weight, None if linear.bias is None else linear.bias.float())
    return (weight * norm.weight.float()).to(dtype), bias


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Float[Tensor, "_tokens _rows"]:
    """x Wᵀ + bias of half precision, summed and returned in float32."""
    if x.is_cuda and _SUMS_STAY:
        if bias is None:
            return torch.mm(x, weight.mT, out_dtype=torch.float32)
        return torch.addmm(bias, x, weight.mT, out_dtype=torch.float32)
    if x.is_cuda:
        out = F.linear(x, weight).float()
        return out if bias is None else out.add_(bias)
    return F.linear(x.float(), weight.float(), bias)


_SUMS_STAY = hasattr(torch.ops.aten.mm, "dtype")
"""Whether torch (≥ 2.8) can return the sums of a product of half precision in float32."""


def _means(x: Tokens, spans: Spans, valid: Valid | None) -> Float[Tensor, "rows hidden_size"]:
    padded, mask = spans.pad(x), spans.inside if valid is None else spans.pad(valid)
    sums = torch.where(mask[..., None], padded, 0).sum(1, dtype=torch.float32)
    return (sums / mask.sum(-1, keepdim=True).clamp_min(1)).to(x.dtype)


def _running_means(x: Tokens, spans: Spans, valid: Valid | None) -> Tokens:
    """The mean of the valid tokens of a row up to each one."""
    padded, mask = spans.pad(x), (spans.inside if valid is None else spans.pad(valid))[..., None]
    sums = torch.where(mask, padded, 0).cumsum(-2, dtype=torch.float32)
    return spans.flatten(sums / mask.cumsum(-2).clamp_min(1)).to(x.dtype)
