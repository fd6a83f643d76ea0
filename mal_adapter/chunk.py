"""One chunk of the Titans update, and its derivative written out: as many GEMMs as it needs, three tensors kept.

The equations are in `mal_adapter.update`. Here rows and heads are one dimension, and all of a memory is one tensor
(layers, rows·heads, 2, d, h): weights and momentum of a layer lie behind one another, so that one GEMM adds to both.
The second layer, (h, d) by nature, is kept transposed, so that layers have one shape.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from mal_adapter.gates import ChunkScalars

__all__ = ["MAX_SILU_SLOPE", "WriteChunk", "advance", "full_precision"]

MAX_SILU_SLOPE = 1.1
"""An upper bound of |d SiLU(z)/dz|, whose maximum is 1.0998."""

Initial = Float[Tensor, "layers heads d h"]
Current = Float[Tensor, "layers rows·heads d h"]
Memory = Float[Tensor, "layers rows·heads 2 d h"]
Scalar = Float[Tensor, "rows·heads tokens"]
Vector = Float[Tensor, "rows·heads tokens d"]
Hidden = Float[Tensor, "rows·heads tokens h"]
Steps = Float[Tensor, "rows·heads tokens 2"]
Tokens = Float[Tensor, "rows·heads tokens 3"]


def advance(
    initial: Initial, memory: Memory, keys: Vector, values: Vector, key_norms: Scalar, chunk: ChunkScalars
) -> Sequence[Tensor]:
    """Take a memory through a chunk, in place.

    Args:
        initial: Learned initial weights.
        memory: Deviations from them and momentum.
        keys: k_t.
        values: v_t.
        key_norms: ‖k_t‖.
        chunk: The gates' scalars, one row per row of keys.

    Returns:
        What the derivative would have to compute with a GEMM again.
    """
    current = _current(initial, memory)
    pairs, curvature, kept = _surprise(current, keys, values, key_norms)
    steps = chunk.tokens[..., :2] / _bound(chunk.tokens, curvature)
    w, s = memory.unbind(2)
    w.mul_(chunk.decay).addcmul_(s, chunk.carry)
    s.mul_(chunk.persist)
    for layer, (narrow, wide) in zip(memory.flatten(2, 3), pairs, strict=True):
        # Σ θ c x eᵀ and Σ θ p x eᵀ with one GEMM
        layer.baddbmm_(_twice(narrow, steps).mT, wide, alpha=-1)
    return kept


def _twice(x: Vector, steps: Steps) -> Float[Tensor, "rows·heads tokens 2*d"]:
    """`x` in both weightings, side by side."""
    return (x[:, :, None] * steps[..., None]).flatten(2)


def _current(initial: Initial, memory: Memory) -> Current:
    """The weights themselves."""
    return (torch.unflatten(memory.select(2, 0), 1, (-1, initial.shape[1])) + initial[:, None]).flatten(1, 2)


class _Surprise(NamedTuple):
    pairs: list[tuple[Tensor, Tensor]]
    """per layer the vectors whose outer product is each token's gradient, `Vector` and `Hidden` or the reverse"""
    curvature: Scalar
    """a bound J_t of the squared norm of the memory's Jacobian"""
    kept: Sequence[Tensor]


def _surprise(weights: Current, keys: Vector, values: Vector, key_norms: Scalar) -> _Surprise:
    if len(weights) == 1:
        e = torch.baddbmm(values, keys, weights[0], beta=-1)
        return _Surprise([(keys, e)], key_norms.square(), (e,))
    w1, w2 = weights
    z = torch.bmm(keys, w1)
    a = F.silu(z)
    e2 = torch.baddbmm(values, a, w2.mT, beta=-1)
    back = torch.bmm(e2, w2)
    e1 = torch.ops.aten.silu_backward(back, z)  # back · SiLU'(z)
    return _Surprise([(keys, e1), (e2, a)], _curvature(a, w2, key_norms), (z, e2, back))


class _Silu(NamedTuple):
    slope: Hidden
    """SiLU'(z)"""
    bend: Hidden
    """SiLU''(z) = σ (1 − σ) (2 + z − 2 SiLU(z))"""


def _recalled(
    weights: Current, keys: Vector, key_norms: Scalar, kept: Sequence[Tensor]
) -> tuple[_Surprise, _Silu | None]:
    """What `_surprise` was, without its GEMMs, and the activation's derivatives."""
    if len(weights) == 1:
        return _Surprise([(keys, kept[0])], key_norms.square(), kept), None
    z, e2, back = kept
    sigmoid = torch.sigmoid(z)
    a = z * sigmoid
    slope = torch.addcmul(a, sigmoid, 1 - a)  # σ (1 + z (1 − σ))
    bend = sigmoid.addcmul_(sigmoid, sigmoid, value=-1).mul_(torch.sub(z, a, alpha=2).add_(2))
    pairs = [(keys, back * slope), (e2, a)]
    return _Surprise(pairs, _curvature(a, weights[1], key_norms), kept), _Silu(slope, bend)


def _curvature(a: Hidden, w2: Float[Tensor, "rows·heads d h"], key_norms: Scalar) -> Scalar:
    """‖a‖² + ‖W2‖² ‖k‖² max|SiLU'|²"""
    stretch = torch.linalg.vector_norm(w2, dim=(-2, -1)).mul_(MAX_SILU_SLOPE)
    return torch.hypot(torch.linalg.vector_norm(a, dim=-1), key_norms * stretch[:, None]).square_()


def _bound(tokens: Tokens, curvature: Scalar) -> Float[Tensor, "rows·heads 1 1"]:
    """What a chunk's step sizes are divided by to keep the write stable, ≥ 1.

    A chunk is one large step of gradient descent with momentum. Along the stiffest direction, error x and momentum s
    go to (1 − γ) x + q s and P s − β x, with γ = Σ θ c J, β = Σ θ p J, q = `carry` and P = `persist`. γ ≤ 1 keeps the
    step itself from overshooting; q β − γ P ≤ 1 − P (Jury's criterion: the determinant stays below 1) keeps the
    momentum carried into later chunks from building up.
    """
    return _bounds(tokens, curvature).amax(-1, keepdim=True).clamp_min_(1.0)


def _bounds(tokens: Tokens, curvature: Scalar) -> Float[Tensor, "rows·heads 1 2"]:
    """γ and (q β − γ P) / (1 − P)."""
    return torch.bmm(curvature[:, None], tokens[..., ::2])


class WriteChunk(torch.autograd.Function):
    """One chunk with the derivative of the closed form, that through `key_norms` counted in keys'."""

    @staticmethod
    def forward(
        ctx: Any,
        initial: Initial,
        memory: Memory,
        keys: Vector,
        values: Vector,
        key_norms: Scalar,
        *scalars: Float[Tensor, "rows·heads _ _"],
    ) -> Memory:
        written = memory.clone()
        kept = advance(initial, written, keys, values, key_norms, ChunkScalars(*scalars))
        ctx.save_for_backward(initial, memory, keys, key_norms, *scalars, *kept)
        return written

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_written: Memory) -> tuple[Tensor | None, ...]:
        initial, memory, keys, key_norms, *rest = ctx.saved_tensors
        with full_precision(d_written.device):
            d = _write_chunk_backward(initial, memory, keys, key_norms, ChunkScalars(*rest[:4]), rest[4:], d_written)
        d_initial, d_memory, d_keys, d_values, *d_scalars = d
        return d_initial, d_memory, d_keys, d_values, None, *d_scalars


def _write_chunk_backward(
    initial: Initial,
    memory: Memory,
    keys: Vector,
    key_norms: Scalar,
    chunk: ChunkScalars,
    kept: Sequence[Tensor],
    d_written: Memory,
) -> tuple[Tensor, ...]:
    current = _current(initial, memory)
    surprise, silu = _recalled(current, keys, key_norms, kept)
    pairs, curvature, _ = surprise
    bound = _bound(chunk.tokens, curvature)
    steps = chunk.tokens[..., :2] / -bound  # with the sign that they have in the sums

    # both weighted sums, towards the vectors of each pair and the steps
    d_pairs, d_steps = [], torch.zeros_like(steps)
    for (narrow, wide), d_sums in zip(pairs, d_written.flatten(2, 3), strict=True):
        d_twice = torch.unflatten(torch.bmm(wide, d_sums.mT), -1, (2, -1))
        d_pairs.append(((d_twice * steps[..., None]).sum(-2), torch.bmm(_twice(narrow, steps), d_sums)))
        d_steps += (d_twice * narrow[:, :, None]).sum(-1)
    d_tokens, d_curvature = _steps_backward(chunk.tokens, curvature, bound, d_steps)
    d_keys, d_values, d_current = _surprise_backward(current, keys, key_norms, surprise, silu, d_pairs, d_curvature)

    d_w, d_s = d_written.unbind(2)
    d_memory = torch.empty_like(memory)
    torch.addcmul(d_current, d_w, chunk.decay, out=d_memory.select(2, 0))
    torch.addcmul(d_w * chunk.carry, d_s, chunk.persist, out=d_memory.select(2, 1))
    # the four dot products of what came out (weights, momentum) with what went in
    dots = torch.bmm(d_written.flatten(0, 1).flatten(2), memory.flatten(0, 1).flatten(2).mT)
    dots = torch.unflatten(dots, 0, memory.shape[:2]).sum(0)
    d_decay, d_carry, d_persist = (dots[:, i, j, None, None] for i, j in ((0, 0), (0, 1), (1, 1)))
    d_initial = torch.unflatten(d_current, 1, (-1, initial.shape[1])).sum(1)
    return d_initial, d_memory, d_keys, d_values, d_tokens, d_decay, d_carry, d_persist


def _steps_backward(
    tokens: Tokens,
    curvature: Scalar,
    bound: Float[Tensor, "rows·heads 1 1"],
    d_steps: Steps,
) -> tuple[Tokens, Scalar]:
    """The derivative of −tokens / bound towards tokens and curvature."""
    bounds = _bounds(tokens, curvature)
    acts = (bounds == bound) & (bound > 1)  # the larger of the two, while it is over 1
    d_bounds = acts * (d_steps * tokens[..., :2]).sum((-2, -1), keepdim=True) / bound.square()
    d_tokens = F.pad(d_steps / -bound, (0, 1))
    d_tokens[..., ::2].addcmul_(d_bounds, curvature[..., None])
    return d_tokens, (d_bounds * tokens[..., ::2]).sum(-1)


def _surprise_backward(
    weights: Current,
    keys: Vector,
    key_norms: Scalar,
    surprise: _Surprise,
    silu: _Silu | None,
    d_pairs: list[tuple[Tensor, Tensor]],
    d_curvature: Scalar,
) -> tuple[Vector, Vector, Current]:
    """The derivative of `_surprise` towards keys, values and weights. Takes over `d_pairs`."""
    d_curvature = 2 * d_curvature[..., None]
    if silu is None:
        ((d_keys, d_e),) = d_pairs
        return d_keys.baddbmm_(d_e, weights[0].mT).addcmul_(d_curvature, keys), -d_e, torch.bmm(keys.mT, d_e)[None]
    w1, w2 = weights
    _, e2, back = surprise.kept
    a = surprise.pairs[1][1]
    (d_keys, d_e1), (d_e2, d_a) = d_pairs
    d_weights = torch.empty_like(weights)
    d_w1, d_w2 = d_weights
    # J = ‖a‖² + ‖W2‖² ‖k‖² max|SiLU'|²
    d_a.addcmul_(d_curvature, a)
    stretch = torch.linalg.vector_norm(w2, dim=(-2, -1), keepdim=True).mul_(MAX_SILU_SLOPE)
    d_keys.addcmul_(d_curvature * stretch.square_(), keys)
    d_stretch = torch.bmm(d_curvature.mT, key_norms.square()[..., None]).mul_(MAX_SILU_SLOPE**2)
    # e1 = back · SiLU'(z), back = e2 W2ᵀ, e2 = a W2 − v, a = SiLU(z), z = k W1
    d_back = d_e1 * silu.slope
    d_e2.baddbmm_(d_back, w2.mT)
    torch.mul(w2, d_stretch, out=d_w2).baddbmm_(e2.mT, d_back).baddbmm_(d_e2.mT, a)
    d_a.baddbmm_(d_e2, w2)
    d_z = d_a.mul_(silu.slope).addcmul_(d_e1.mul_(back), silu.bend)
    torch.bmm(keys.mT, d_z, out=d_w1)
    return d_keys.baddbmm_(d_z, w1.mT), -d_e2, d_weights


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Under autocast a state in float32 would meet GEMMs in half precision."""
    inside = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if inside else nullcontext()
