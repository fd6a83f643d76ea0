"""One chunk of the Titans update, and its derivative written out: as many GEMMs as it needs, three tensors kept.

The equations are in `mal_adapter.update`. Here rows and heads are one dimension, and the weights and the momentum of a
layer are one tensor, side by side along the layer's narrower dimension, so that one GEMM adds to both.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mal_adapter.gates import ChunkScalars

__all__ = ["MAX_SILU_SLOPE", "WriteChunk", "advance", "full_precision", "side"]

MAX_SILU_SLOPE = 1.1
"""An upper bound of |d SiLU(z)/dz|, whose maximum is 1.0998."""


def side(layer: Tensor) -> int:
    """The dimension along which a layer's weights and momentum stand side by side: the narrower one."""
    return -2 if layer.shape[-2] <= layer.shape[-1] else -1


def advance(
    initial: Sequence[Tensor], joint: Sequence[Tensor], keys: Tensor, values: Tensor, chunk: ChunkScalars
) -> tuple[Tensor, ...]:
    """Take weights and momentum, side by side per layer, through a chunk, in place.

    Args:
        initial: Learned initial weights, (heads, d_in, d_out) per layer.
        joint: Deviations and momentum, (rows · heads, 2 d_in, d_out) or (rows · heads, d_in, 2 d_out) per layer.
        keys: (rows · heads, tokens, head_dim).
        values: The same shape.
        chunk: The gates' scalars, one row per row of keys.

    Returns:
        What the derivative would have to compute with a GEMM again.
    """
    current = _current(initial, joint)
    pairs, curvature, kept = _surprise(current, keys, values)
    steps = chunk.tokens[..., :2] * _trust(chunk.tokens, curvature)
    for layer, now, (x, e) in zip(joint, current, pairs, strict=True):
        w, s = layer.chunk(2, dim=side(now))
        w.mul_(chunk.decay).addcmul_(s, chunk.carry)
        s.mul_(chunk.persist)
        # Σ θ c x eᵀ and Σ θ p x eᵀ with one GEMM
        if side(now) == -2:
            layer.baddbmm_(_twice(x, steps).mT, e, alpha=-1)
        else:
            layer.baddbmm_(x.mT, _twice(e, steps), alpha=-1)
    return kept


def _twice(x: Tensor, steps: Tensor) -> Tensor:
    """`x` (rows · heads, tokens, d) in both weightings, side by side."""
    return (x[:, :, None] * steps[..., None]).flatten(2)


def _current(initial: Sequence[Tensor], joint: Sequence[Tensor]) -> list[Tensor]:
    """The weights themselves, (rows · heads, d_in, d_out) per layer."""
    current = []
    for w0, layer in zip(initial, joint, strict=True):
        deviation = layer.chunk(2, dim=side(w0))[0]
        current.append((torch.unflatten(deviation, 0, (-1, len(w0))) + w0).flatten(0, 1))
    return current


class _Surprise(NamedTuple):
    pairs: list[tuple[Tensor, Tensor]]
    """per layer, (x_t, e_t), whose outer product is each token's gradient"""
    curvature: Tensor
    """a bound J_t of the squared norm of the memory's Jacobian, (rows · heads, tokens)"""
    kept: tuple[Tensor, ...]


def _surprise(weights: Sequence[Tensor], keys: Tensor, values: Tensor, kept: Sequence[Tensor] = ()) -> _Surprise:
    key_norm = torch.linalg.vector_norm(keys, dim=-1)
    if len(weights) == 1:
        e = kept[0] if kept else torch.baddbmm(values, keys, weights[0], beta=-1)
        return _Surprise([(keys, e)], key_norm.square(), (e,))
    w1, w2 = weights
    z = kept[0] if kept else torch.bmm(keys, w1)
    a = F.silu(z)
    e2 = kept[1] if kept else torch.baddbmm(values, a, w2, beta=-1)
    back = kept[2] if kept else torch.bmm(e2, w2.mT)
    e1 = torch.ops.aten.silu_backward(back, z)  # back · SiLU'(z)
    curvature = torch.hypot(torch.linalg.vector_norm(a, dim=-1), key_norm * _stretch(w2)).square()
    return _Surprise([(keys, e1), (a, e2)], curvature, (z, e2, back))


def _stretch(w2: Tensor) -> Tensor:
    """How much a two-layer memory stretches its first layer's output at most, (rows · heads, 1)."""
    norm: Tensor = torch.linalg.vector_norm(w2, dim=(-2, -1))
    return norm[:, None] * MAX_SILU_SLOPE


def _trust(tokens: Tensor, curvature: Tensor) -> Tensor:
    """The factor ≤ 1 on a chunk's step sizes that keeps the write stable, (rows · heads, 1, 1).

    A chunk is one large step of gradient descent with momentum. Along the stiffest direction, error x and momentum s
    go to (1 − γ) x + q s and P s − β x, with γ = Σ θ c J, β = Σ θ p J, q = `carry` and P = `persist`. γ ≤ 1 keeps the
    step itself from overshooting; q β − γ P ≤ 1 − P (Jury's criterion: the determinant stays below 1) keeps the
    momentum carried into later chunks from building up.
    """
    return _bounds(tokens, curvature).amax(-1, keepdim=True).clamp_min(1.0).reciprocal()


def _bounds(tokens: Tensor, curvature: Tensor) -> Tensor:
    """γ and (q β − γ P) / (1 − P), (rows · heads, 1, 2)."""
    return torch.bmm(curvature[:, None], tokens)[..., ::2]


class WriteChunk(torch.autograd.Function):
    """One chunk with the derivative of the closed form."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, values: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        chunk, layers = ChunkScalars(*rest[:4]), rest[4:]
        initial, joint = layers[: len(layers) // 2], layers[len(layers) // 2 :]
        new = tuple(t.clone() for t in joint)
        kept = advance(initial, new, keys, values, chunk)
        ctx.save_for_backward(keys, *rest, *kept)
        return new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_joint: Tensor) -> tuple[Tensor, ...]:
        with full_precision(d_joint[0].device):
            return _write_chunk_backward(ctx.saved_tensors, d_joint)


def _write_chunk_backward(saved: Sequence[Tensor], d_joint: Sequence[Tensor]) -> tuple[Tensor, ...]:
    depth = len(d_joint)
    keys, *rest = saved
    chunk, initial, joint = ChunkScalars(*rest[:4]), rest[4 : 4 + depth], rest[4 + depth : 4 + 2 * depth]
    kept = rest[4 + 2 * depth :]
    current = _current(initial, joint)
    pairs, curvature, _ = _surprise(current, keys, keys, kept)
    trust = _trust(chunk.tokens, curvature)
    steps = chunk.tokens[..., :2] * -trust  # with the sign that they have in the sums

    d_pairs, d_steps = [], torch.zeros_like(steps)
    for now, (x, e), d_layer in zip(current, pairs, d_joint, strict=True):
        d_x, d_e, d_both = _sums_backward(x, e, steps, d_layer, x_is_narrow=side(now) == -2)
        d_pairs.append((d_x, d_e))
        d_steps += d_both
    d_tokens, d_curvature = _steps_backward(chunk.tokens, curvature, trust, d_steps)
    d_keys, d_values, d_current = _surprise_backward(current, keys, pairs, kept, d_pairs, d_curvature)

    d_before = []
    d_decay = d_carry = d_persist = torch.zeros_like(chunk.decay)
    for layer, d_layer, d_now in zip(joint, d_joint, d_current, strict=True):
        dim = side(d_now)
        (w, s), (d_w, d_s) = layer.chunk(2, dim=dim), d_layer.chunk(2, dim=dim)
        d_decay, d_carry, d_persist = d_decay + _dot(d_w, w), d_carry + _dot(d_w, s), d_persist + _dot(d_s, s)
        before = torch.cat((d_now, d_w * chunk.carry), dim=dim)
        for part, scale, d in zip(before.chunk(2, dim=dim), (chunk.decay, chunk.persist), (d_w, d_s), strict=True):
            part.addcmul_(d, scale)
        d_before.append(before)
    d_initial = (torch.unflatten(d, 0, (-1, len(w0))).sum(0) for d, w0 in zip(d_current, initial, strict=True))
    return d_keys, d_values, d_tokens, d_decay, d_carry, d_persist, *d_initial, *d_before


def _sums_backward(
    x: Tensor, e: Tensor, steps: Tensor, d_layer: Tensor, *, x_is_narrow: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivative of both weighted sums of x eᵀ towards x, e and `steps`."""
    narrow, wide, d_sums = (x, e, d_layer) if x_is_narrow else (e, x, d_layer.mT)
    d_wide = torch.bmm(_twice(narrow, steps), d_sums)
    d_twice = torch.unflatten(torch.bmm(wide, d_sums.mT), -1, (2, -1))
    d_steps = (d_twice * narrow[:, :, None]).sum(-1)
    d_narrow = (d_twice * steps[..., None]).sum(-2)
    return (d_narrow, d_wide, d_steps) if x_is_narrow else (d_wide, d_narrow, d_steps)


def _steps_backward(tokens: Tensor, curvature: Tensor, trust: Tensor, d_steps: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative of −trust · tokens towards tokens and curvature."""
    # trust = 1 / bound while the larger of the two bounds is over 1
    bounds = _bounds(tokens, curvature)
    acts = (bounds == bounds.amax(-1, keepdim=True)) & (trust < 1)
    d_bounds = acts * (d_steps * tokens[..., :2]).sum((-2, -1), keepdim=True) * trust.square()
    d_tokens = F.pad(d_steps * -trust, (0, 1))
    d_tokens[..., ::2].addcmul_(d_bounds, curvature[..., None])
    return d_tokens, (d_bounds * tokens[..., ::2]).sum(-1)


def _surprise_backward(
    weights: Sequence[Tensor],
    keys: Tensor,
    pairs: list[tuple[Tensor, Tensor]],
    kept: Sequence[Tensor],
    d_pairs: list[tuple[Tensor, Tensor]],
    d_curvature: Tensor,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The derivative of `_surprise` towards keys, values and weights. Takes over `d_pairs`."""
    d_curvature = 2 * d_curvature[..., None]
    if len(weights) == 1:
        ((d_keys, d_e),) = d_pairs
        return d_keys.baddbmm_(d_e, weights[0].mT).addcmul_(d_curvature, keys), -d_e, [torch.bmm(keys.mT, d_e)]
    w1, w2 = weights
    z, e2, back = kept
    a = pairs[1][0]
    (d_keys, d_e1), (d_a, d_e2) = d_pairs
    # J = ‖a‖² + ‖W2‖² ‖k‖² max|SiLU'|²
    d_a.addcmul_(d_curvature, a)
    d_keys.addcmul_(d_curvature * _stretch(w2).square()[..., None], keys)
    d_w2 = w2 * ((d_curvature * keys.square()).sum((-2, -1), keepdim=True) * MAX_SILU_SLOPE**2)
    # e1 = back · SiLU'(z), back = e2 W2ᵀ, e2 = a W2 − v, a = SiLU(z), z = k W1
    d_back = torch.ops.aten.silu_backward(d_e1, z)
    d_e2.baddbmm_(d_back, w2)
    d_w2.baddbmm_(d_back.mT, e2).baddbmm_(a.mT, d_e2)
    d_a.baddbmm_(d_e2, w2.mT)
    # SiLU''(z) = σ (1 − σ) (2 + z − 2 SiLU(z))
    sigmoid = torch.sigmoid(z)
    bend = torch.addcmul(sigmoid, sigmoid, sigmoid, value=-1).mul_(torch.sub(z, a, alpha=2).add_(2))
    d_z = torch.ops.aten.silu_backward(d_a, z).addcmul_(d_e1.mul_(back), bend)
    return d_keys.baddbmm_(d_z, w1.mT), -d_e2, [torch.bmm(keys.mT, d_z), d_w2]


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum((-2, -1), keepdim=True)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Under autocast a state in float32 would meet GEMMs in half precision."""
    inside = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if inside else nullcontext()
