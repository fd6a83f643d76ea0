"""One chunk of the Titans update, with an explicit derivative: the fewest GEMMs, and few tensors saved for backward.

The equations are in `mal_adapter.memory.titans`. Here rows and heads are one dimension, and a whole memory is one
tensor (rows·heads, layers, 2, d, h). Weights and momentum of a layer are neighbours, so that one GEMM adds to both. The
second layer, of shape (h, d), is stored transposed, so that both layers have one shape.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from mal_adapter.memory.gates import ChunkScalars
from mal_adapter.memory.precision import full_precision

__all__ = [
    "MAX_SILU_SLOPE",
    "Initial",
    "Memory",
    "Vector",
    "WriteChunk",
    "advance",
    "split_chunks",
]

MAX_SILU_SLOPE = 1.1
"""An upper bound of |d SiLU(z)/dz|, whose maximum is 1.0998."""

Initial = Float[Tensor, "heads layers d h"]
Current = Float[Tensor, "rows·heads layers d h"]
Memory = Float[Tensor, "rows·heads layers 2 d h"]
Vector = Float[Tensor, "rows·heads tokens d"]
Hidden = Float[Tensor, "rows·heads tokens h"]
Twice = Float[Tensor, "rows·heads tokens 2*d"]
Scalar = Float[Tensor, "rows·heads 1 1"]
Totals = Float[Tensor, "rows·heads 1 2"]


class Chunk(NamedTuple):
    """The input of one gradient step. Everything that does not depend on the memory is computed beforehand."""

    keys: Vector
    """k_t"""
    values: Vector
    """v_t"""
    weighted_keys: Twice
    """θ_t c_t k_t and θ_t p_t k_t, side by side"""
    steps: Float[Tensor, "rows·heads tokens 2"]
    """θ_t c_t and θ_t p_t"""
    reach: Float[Tensor, "rows·heads tokens 2"]
    """θ_t c_t and θ_t (q p_t − P c_t) / (1 − P): the length of a token's step, in this chunk and later by momentum"""
    key_reach: Totals
    """Σ reach_t ‖k_t‖²"""
    decay: Scalar
    carry: Scalar
    persist: Scalar


def split_chunks(keys: Vector, values: Vector, scalars: ChunkScalars) -> Iterator[Chunk]:
    """The chunks of a sequence.

    Args:
        keys: k_t.
        values: v_t.
        scalars: The products of the gates, (rows·heads, chunks, …); the last chunk may be longer than the rest of the
            sequence.
    """
    chunk_size = scalars.tokens.shape[2]
    tokens = scalars.tokens.flatten(1, 2)[:, : keys.shape[1]]
    steps, reach = tokens[..., :2], tokens[..., ::2]
    squares = keys.square().sum(-1)
    if padding := -keys.shape[1] % chunk_size:
        squares = F.pad(squares, (0, padding))
    key_reach = torch.unflatten(squares, 1, (-1, 1, chunk_size)) @ scalars.tokens[..., ::2]
    per_token = (torch.split(t, chunk_size, dim=1) for t in (keys, values, _weight_twice(keys, steps), steps, reach))
    per_chunk = (t.unbind(1) for t in (key_reach, *scalars[1:]))
    return map(Chunk, *per_token, *per_chunk)


def _weight_twice(x: Vector, steps: Float[Tensor, "rows·heads tokens 2"]) -> Twice:
    """`x` times each of the two step weights, side by side."""
    return (x[:, :, None] * steps[..., None]).flatten(2)


class _Saved(NamedTuple):
    """Intermediate results for the derivative, each of which a GEMM has computed."""

    totals: Totals
    errors: Vector
    z: Hidden | None
    back: Hidden | None


def advance(initial: Initial, memory: Memory, chunk: Chunk) -> _Saved:
    """Write a chunk into a memory, in place.

    Args:
        initial: Learned initial weights.
        memory: Deviations from them, and momentum.
        chunk: The tokens.
    """
    current = _current(initial, memory)
    z = back = None
    if current.shape[1] == 1:
        totals = chunk.key_reach
        errors = torch.baddbmm(chunk.values, chunk.keys, current[:, 0], alpha=-1).div_(_bound(totals))
        surprise = [(chunk.weighted_keys, errors)]
    else:
        w1, w2 = current.unbind(1)
        z = torch.bmm(chunk.keys, w1)
        a = F.silu(z)
        activity = torch.linalg.vector_norm(a, dim=-1).square_()[:, None]
        totals = torch.bmm(activity, chunk.reach).addcmul_(chunk.key_reach, _frobenius_sq(w2), value=MAX_SILU_SLOPE**2)
        errors = torch.baddbmm(chunk.values, a, w2.mT, alpha=-1).div_(_bound(totals))
        back = torch.bmm(errors, w2)
        hidden_errors = torch.ops.aten.silu_backward(back, z)  # back · SiLU'(z)
        surprise = [(chunk.weighted_keys, hidden_errors), (_weight_twice(errors, chunk.steps), a)]

    w, s = memory.unbind(2)
    decay, carry, persist = (scalar[..., None] for scalar in (chunk.decay, chunk.carry, chunk.persist))
    w.mul_(decay).addcmul_(s, carry)
    s.mul_(persist)
    for layer, (weighted, wide) in zip(memory.flatten(2, 3).unbind(1), surprise, strict=True):
        layer.baddbmm_(weighted.mT, wide)  # −Σ θ c G and −Σ θ p G with one GEMM
    return _Saved(totals, errors, z, back)


def _current(initial: Initial, memory: Memory) -> Current:
    """The current weights: initial weights plus deviations."""
    return (torch.unflatten(memory[:, :, 0], 0, (-1, len(initial))) + initial).flatten(0, 1)


def _frobenius_sq(w2: Float[Tensor, "rows·heads d h"]) -> Scalar:
    """‖W2‖²"""
    stretch: Tensor = torch.linalg.vector_norm(w2, dim=(-2, -1), keepdim=True).square_()
    return stretch


def _bound(totals: Totals) -> Scalar:
    """The divisor of a chunk's errors, and so of its step, that makes the write stable; ≥ 1.

    A chunk is one large step of gradient descent with momentum. Along the stiffest direction, error x and momentum s
    become (1 − γ) x + q s and P s − β x, with γ = Σ θ c J, β = Σ θ p J, q = `carry` and P = `persist`. If γ ≤ 1, the
    step itself does not overshoot. If q β − γ P ≤ 1 − P (Jury's criterion: the determinant is below 1), the momentum
    that is carried into later chunks does not build up. J_t bounds the squared norm of the memory's Jacobian: ‖k_t‖²
    for one layer, ‖a_t‖² + ‖W2‖² ‖k_t‖² max|SiLU'|² for two.

    Args:
        totals: γ and (q β − γ P) / (1 − P).
    """
    return totals.amax(-1, keepdim=True).clamp_min_(1)


class WriteChunk(torch.autograd.Function):
    """One chunk with the derivative of the closed form."""

    @staticmethod
    def forward(ctx: Any, initial: Initial, memory: Memory, *chunk: Tensor) -> Memory:
        written = memory.clone()
        saved = advance(initial, written, Chunk(*chunk))
        ctx.save_for_backward(initial, memory, *chunk, *saved)
        return written

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_written: Memory) -> tuple[Tensor | None, ...]:
        initial, memory, *rest = ctx.saved_tensors
        chunk, saved = Chunk(*rest[: len(Chunk._fields)]), _Saved(*rest[len(Chunk._fields) :])
        with full_precision(d_written.device):
            return _write_chunk_backward(initial, memory, chunk, saved, d_written)


def _write_chunk_backward(
    initial: Initial, memory: Memory, chunk: Chunk, saved: _Saved, d_written: Memory
) -> tuple[Tensor | None, ...]:
    current = _current(initial, memory)
    backward = _one_layer_backward if current.shape[1] == 1 else _two_layers_backward
    d_current, d_tokens = backward(current, chunk, saved, d_written.flatten(2, 3))
    d_w, d_s = d_written.unbind(2)
    d_memory = torch.empty_like(memory)
    torch.addcmul(d_current, d_w, chunk.decay[..., None], out=d_memory[:, :, 0])
    torch.addcmul(d_w * chunk.carry[..., None], d_s, chunk.persist[..., None], out=d_memory[:, :, 1])
    # the four dot products of the output's gradients (weights, momentum) with the inputs
    dots = torch.bmm(d_written.flatten(0, 1).flatten(2), memory.flatten(0, 1).flatten(2).mT)
    dots = torch.unflatten(dots, 0, memory.shape[:2]).sum(1)
    d_decay, d_carry, d_persist = (dots[:, i, j, None, None] for i, j in ((0, 0), (0, 1), (1, 1)))
    # As few dimensions as possible: MPS has failed on sums over tensors of five dimensions.
    d_initial = torch.unflatten(d_current.flatten(1), 0, (-1, len(initial))).sum(0).view_as(initial)
    return d_initial, d_memory, *d_tokens, d_decay, d_carry, d_persist


def _one_layer_backward(
    current: Current, chunk: Chunk, saved: _Saved, d_sums: Float[Tensor, "rows·heads 1 2*d h"]
) -> tuple[Current, tuple[Tensor | None, ...]]:
    """The derivative with respect to the weights, and to keys, values, weighted keys, steps, reach and key_reach."""
    d_weighted = torch.bmm(saved.errors, d_sums[:, 0].mT)
    d_errors = torch.bmm(chunk.weighted_keys, d_sums[:, 0])
    d_values, d_totals = _errors_backward(saved, d_errors)
    d_keys = torch.bmm(d_values, current[:, 0].mT).neg_()
    d_current = torch.bmm(chunk.keys.mT, d_values).neg_()[:, None]
    return d_current, (d_keys, d_values, d_weighted, None, None, d_totals)


def _two_layers_backward(
    current: Current, chunk: Chunk, saved: _Saved, d_sums: Float[Tensor, "rows·heads 2 2*d h"]
) -> tuple[Current, tuple[Tensor, ...]]:
    """The derivative with respect to the weights, and to keys, values, weighted keys, steps, reach and key_reach."""
    if saved.z is None or saved.back is None:
        raise RuntimeError("a memory of two layers needs z and back")
    w1, w2 = current.unbind(1)
    d_current = torch.empty_like(current)
    d_w1, d_w2 = d_current.unbind(1)
    z, back, errors = saved.z, saved.back, saved.errors
    sigmoid = torch.sigmoid(z)
    a = z * sigmoid
    slope = torch.addcmul(a, sigmoid, 1 - a)  # SiLU'(z) = σ (1 + z (1 − σ))
    bend = sigmoid.addcmul_(sigmoid, sigmoid, value=-1).mul_(torch.sub(z, a, alpha=2).add_(2))
    # SiLU''(z) = σ (1 − σ) (2 + z − 2 SiLU(z))

    # the sums: weighted keys with back · SiLU'(z), weighted errors with a
    d_weighted = torch.bmm(back * slope, d_sums[:, 0].mT)
    d_hidden_errors = torch.bmm(chunk.weighted_keys, d_sums[:, 0])
    d_twice = torch.unflatten(torch.bmm(a, d_sums[:, 1].mT), -1, (2, -1))
    d_a = torch.bmm(_weight_twice(errors, chunk.steps), d_sums[:, 1])
    d_steps = (d_twice * errors[:, :, None]).sum(-1)
    d_errors = (d_twice * chunk.steps[..., None]).sum(-2)
    # back = errors W2ᵀ
    d_back = d_hidden_errors * slope
    d_errors.baddbmm_(d_back, w2.mT)
    # errors = (v − a W2) / bound
    d_values, d_totals = _errors_backward(saved, d_errors)
    d_a.baddbmm_(d_values, w2, alpha=-1)
    # totals = Σ reach ‖a‖² + ‖W2‖² max|SiLU'|² Σ reach ‖k‖²
    d_a.addcmul_(torch.bmm(chunk.reach, d_totals.mT), a, value=2)
    d_reach = torch.linalg.vector_norm(a, dim=-1, keepdim=True).square_() * d_totals
    d_stretch = torch.bmm(d_totals, chunk.key_reach.mT).mul_(2 * MAX_SILU_SLOPE**2)
    torch.mul(w2, d_stretch, out=d_w2).baddbmm_(errors.mT, d_back).baddbmm_(d_values.mT, a, alpha=-1)
    # a = SiLU(z), z = k W1
    d_z = d_a.mul_(slope).addcmul_(d_hidden_errors.mul_(back), bend)
    torch.bmm(chunk.keys.mT, d_z, out=d_w1)
    d_keys = torch.bmm(d_z, w1.mT)
    return d_current, (
        d_keys,
        d_values,
        d_weighted,
        d_steps,
        d_reach,
        d_totals * _frobenius_sq(w2).mul_(MAX_SILU_SLOPE**2),
    )


def _errors_backward(saved: _Saved, d_errors: Vector) -> tuple[Vector, Totals]:
    """The derivative of errors = (v − M(k)) / bound by v and by the two totals, of which the larger is the bound."""
    bound = _bound(saved.totals)
    d_bound = (d_errors * saved.errors).sum((-2, -1), keepdim=True) / -bound
    return d_errors / bound, d_bound * ((saved.totals == bound) & (bound > 1))
