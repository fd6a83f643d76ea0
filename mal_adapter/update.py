"""The Titans update in closed form: pure functions on tensors, for a memory of one matrix or a two-layer MLP.

Per token t of a chunk, with all gradients taken at the weights the chunk starts with (arXiv 2501.00663, eqs. 9, 10,
13, 14):

    G_t = ∇ ½‖M(k_t) − v_t‖²
    S_t = η_t S_{t−1} − θ_t G_t
    M_t = (1 − α_t) M_{t−1} + m_t S_t         m_t = 0 at padding, where also θ = 0, η = 1, α = 0

M and S are deviations from the learned initial weights, so forgetting leads back to those and not to zero. Since the
G_t of a chunk do not depend on one another, the chunk's end is a weighted sum of them and no weights per token are
needed:

    a_t = Π_{j>t} (1 − α_j)       p_t = Π_{j>t} η_j       c_t = m_t a_t + η_{t+1} c_{t+1}
    M_T = ((1 − α_1) a_1) M_0 + (η_1 c_1) S_0 − Σ θ_t c_t G_t
    S_T = (η_1 p_1) S_0 − Σ θ_t p_t G_t

`mal_adapter.reference` says the same token by token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MAX_LOGIT", "MAX_SILU_SLOPE", "Gates", "Weights", "read", "write"]

Weights = tuple[Tensor, ...]
"""One tensor per memory layer, (batch, heads, d_in, d_out)."""

MAX_SILU_SLOPE = 1.1
"""An upper bound of |d SiLU(z)/dz|, whose maximum is 1.0998."""


MAX_LOGIT = 50.0
"""Gate logits are clamped here, where float64 can't tell a gate from 0 or 1; so sums of logarithms stay bounded."""

_LOG_ZERO = -1e9  # exp gives 0 beside any sum of clamped logarithms, yet the arithmetic stays finite


class Gates(NamedTuple):
    """Logits of the three gates, each (batch, heads, seq_len)."""

    step: Tensor
    """of θ, the step size"""
    momentum: Tensor
    """of η, how much surprise is carried on"""
    forget: Tensor
    """of α, how much of the memory decays"""


class _ChunkScalars(NamedTuple):
    """What the gates of a chunk come to."""

    # per token, (batch, heads, chunks, chunk_size)
    to_weights: Tensor  # θ_t c_t
    to_momentum: Tensor  # θ_t p_t
    to_later: Tensor  # θ_t (q p_t − P c_t) / (1 − P), see `_trust`
    # per chunk, (batch, heads, chunks, 1, 1)
    decay: Tensor  # (1 − α_1) a_1
    carry: Tensor  # q = η_1 c_1
    persist: Tensor  # P = η_1 p_1


def read(weights: Sequence[Tensor], queries: Tensor) -> Tensor:
    """M(q): what the memory answers.

    Args:
        weights: One or two tensors (batch, heads, d_in, d_out), initial weights and deviations already added.
        queries: (batch, heads, seq_len, head_dim).

    Returns:
        (batch, heads, seq_len, head_dim).

    Example:
        >>> eye = torch.eye(2).view(1, 1, 2, 2)
        >>> read((eye,), torch.tensor([[[[3.0, 4.0]]]]))
        tensor([[[[3., 4.]]]])
    """
    hidden = queries @ weights[0]
    return hidden if len(weights) == 1 else F.silu(hidden) @ weights[1]


def write(
    initial: Weights,
    weights: Weights,
    momentum: Weights,
    keys: Tensor,
    values: Tensor,
    gates: Gates,
    mask: Tensor,
    chunk_size: int,
) -> tuple[Weights, Weights]:
    """Write the pairs (keys, values) into the memory, `chunk_size` tokens per gradient step.

    Differentiable in every float argument. Where no gradient is recorded, the chunks work in place on one copy of the
    state. The arguments themselves are never changed.

    Args:
        initial: Learned initial weights, (heads, d_in, d_out) per layer.
        weights: Deviations from `initial`, (batch, heads, d_in, d_out) per layer.
        momentum: The same shapes.
        keys: (batch, heads, seq_len, head_dim), finite.
        values: (batch, heads, seq_len, head_dim), finite.
        gates: Logits, (batch, heads, seq_len) each.
        mask: (batch, seq_len) bool; False tokens are as if they were not there.
        chunk_size: Tokens per chunk; the last chunk may be shorter.

    Returns:
        New (weights, momentum).

    Example:
        >>> k = torch.tensor([[[[1.0, 0.0]]]])
        >>> v = torch.tensor([[[[0.0, 1.0]]]])
        >>> full_step = Gates(*(torch.full((1, 1, 1), g) for g in (40.0, -40.0, -40.0)))
        >>> zero = (torch.zeros(1, 1, 2, 2),)
        >>> (w,), _ = write((torch.zeros(1, 2, 2),), zero, zero, k, v, full_step, torch.ones(1, 1).bool(), 64)
        >>> read((w,), k)
        tensor([[[[0., 1.]]]])
    """
    seq_len = keys.shape[-2]
    if seq_len == 0:
        return weights, momentum
    chunk_size = min(chunk_size, seq_len)
    scalars = _scalars(gates, mask, chunk_size, keys.dtype)
    # Padding meets weights of zero, but zero times an overflow would still be NaN.
    keys, values = (t * mask[:, None, :, None] for t in (keys, values))

    in_place = not torch.is_grad_enabled()
    if in_place:
        weights, momentum = tuple(w.clone() for w in weights), tuple(s.clone() for s in momentum)
    chunks = zip(torch.split(keys, chunk_size, dim=-2), torch.split(values, chunk_size, dim=-2), strict=True)
    for n, (k, v) in enumerate(chunks):
        chunk = _ChunkScalars(*(s[:, :, n] for s in scalars))
        current = tuple(w0 + w for w0, w in zip(initial, weights, strict=True))
        pairs, curvature = _surprise(current, k, v)
        w_c, w_p, w_later = (w[..., : k.shape[-2]] for w in chunk[:3])
        trust = _trust(w_c, w_later, curvature)
        sums = [_weighted_sums(x, e, (trust * w_c)[..., None], (trust * w_p)[..., None]) for x, e in pairs]
        if in_place:
            for w, s, (d_w, d_s) in zip(weights, momentum, sums, strict=True):
                w.mul_(chunk.decay).addcmul_(s, chunk.carry).sub_(d_w)
                s.mul_(chunk.persist).sub_(d_s)
        else:
            weights, momentum = (
                tuple(
                    chunk.decay * w + chunk.carry * s - d for w, s, (d, _) in zip(weights, momentum, sums, strict=True)
                ),
                tuple(chunk.persist * s - d for s, (_, d) in zip(momentum, sums, strict=True)),
            )
    return weights, momentum


def _surprise(weights: Weights, keys: Tensor, values: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Each token's gradient per layer as an outer product (x_t, e_t), and a bound J_t of its squared Jacobian norm."""
    key_norm = keys.square().sum(-1)
    if len(weights) == 1:
        return [(keys, keys @ weights[0] - values)], key_norm
    w1, w2 = weights
    z = keys @ w1
    sigmoid = torch.sigmoid(z)
    a = z * sigmoid
    e2 = a @ w2 - values
    e1 = (e2 @ w2.mT) * (sigmoid * (1 + z - a))  # SiLU'(z) = σ + z σ (1 − σ) = σ (1 + z − SiLU(z))
    curvature = a.square().sum(-1) + w2.square().sum((-2, -1))[..., None] * key_norm * MAX_SILU_SLOPE**2
    return [(keys, e1), (a, e2)], curvature


def _weighted_sums(x: Tensor, e: Tensor, w_c: Tensor, w_p: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ w_c,t x_t e_tᵀ, Σ w_p,t x_t e_tᵀ) with one GEMM, both weightings side by side on the narrower operand."""
    if x.shape[-1] <= e.shape[-1]:
        c, p = (torch.cat((w_c * x, w_p * x), dim=-1).mT @ e).chunk(2, dim=-2)
    else:
        c, p = (x.mT @ torch.cat((w_c * e, w_p * e), dim=-1)).chunk(2, dim=-1)
    return c, p


def _trust(w_c: Tensor, w_later: Tensor, curvature: Tensor) -> Tensor:
    """The factor ≤ 1 on a chunk's step sizes that keeps the write stable, (batch, heads, 1).

    A chunk is one large step of gradient descent with momentum. Along the stiffest direction, error x and momentum s
    go to (1 − γ) x + q s and P s − β x, with γ = Σ θ c J, β = Σ θ p J, q = `carry` and P = `persist`. γ ≤ 1 keeps the
    step itself from overshooting; q β − γ P ≤ 1 − P (Jury's criterion: the determinant stays below 1) keeps the
    momentum carried into later chunks from building up.
    """
    gamma = (w_c * curvature).sum(-1, keepdim=True)
    built_up = (w_later * curvature).sum(-1, keepdim=True)
    return torch.maximum(gamma, built_up).clamp_min(1.0).reciprocal()


def _scalars(gates: Gates, mask: Tensor, chunk_size: int, dtype: torch.dtype) -> _ChunkScalars:
    """All chunks' scalar weights in one pass, in float64 from the logits: products of gates as sums of logarithms."""
    batch, heads, seq_len = gates.step.shape
    padding = -seq_len % chunk_size
    valid = F.pad(mask, (0, padding)).view(batch, 1, -1, chunk_size)

    def chunked(logit: Tensor) -> Tensor:
        logit = logit.double().clamp(-MAX_LOGIT, MAX_LOGIT)
        return F.pad(logit, (0, padding)).view(batch, heads, -1, chunk_size)

    theta = torch.sigmoid(chunked(gates.step)) * valid
    log_eta = F.logsigmoid(chunked(gates.momentum)) * valid
    log_keep = F.logsigmoid(-chunked(gates.forget)) * valid  # log (1 − α)

    since_start = log_eta.cumsum(-1)  # log Π_{j≤t} η_j
    log_persist = since_start[..., -1:]
    total_keep = log_keep.sum(-1, keepdim=True)
    log_a = total_keep - log_keep.cumsum(-1)
    # c_t = Σ_{j≥t} m_j a_j Π_{t<i≤j} η_i. For m_j = 0 a term of −inf would turn the backward of logcumsumexp into NaN.
    terms = torch.where(valid, log_a + since_start, _LOG_ZERO)
    from_t = terms.flip(-1).logcumsumexp(-1).flip(-1)
    before_t = F.pad(terms, (1, 0), value=_LOG_ZERO)[..., :-1].logcumsumexp(-1)
    log_p = log_persist - since_start
    # q p_t − P c_t, with the common terms j ≥ t left out of both instead of subtracted
    later = torch.exp(log_p + before_t) / -torch.expm1(log_persist).clamp_max(-torch.finfo(torch.float64).tiny)

    def per_chunk(x: Tensor) -> Tensor:
        return x.exp().unsqueeze(-1).to(dtype)

    return _ChunkScalars(
        to_weights=(theta * torch.exp(from_t - since_start)).to(dtype),
        to_momentum=(theta * log_p.exp()).to(dtype),
        to_later=(theta * later).to(dtype),
        decay=per_chunk(total_keep),
        carry=per_chunk(from_t[..., :1]),
        persist=per_chunk(log_persist),
    )
