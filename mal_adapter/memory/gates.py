"""The three gates of a memory, and their products at the end of a chunk."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mal_adapter.memory.gates32 import chunk_scalars_float32
from mal_adapter.memory.precision import widen

__all__ = ["MAX_LOGIT", "ChunkScalars", "Gates", "chunk_scalars"]

MAX_LOGIT = 50.0
"""Gate logits are clamped to ± this value, at which a gate is 0 or 1 in float64. So sums of logarithms are bounded."""

_LOG_ZERO = -1e9  # exp gives 0 beside any sum of clamped logarithms, but all terms are finite


class Gates(NamedTuple):
    """Logits of the three gates: (batch, heads, seq_len), or (tokens, heads) for the tokens of `Spans`."""

    step: Float[Tensor, "*tokens_and_heads"]
    """of θ, the step size"""
    momentum: Float[Tensor, "*tokens_and_heads"]
    """of η, the share of the momentum that is carried to the next token"""
    forget: Float[Tensor, "*tokens_and_heads"]
    """of α, the share of the memory that is forgotten"""


class ChunkScalars(NamedTuple):
    """The products of the gates of one chunk, or of all chunks, which are then in front of the last two dimensions."""

    tokens: Float[Tensor, "*chunks chunk_size 3"]
    """θ_t c_t, θ_t p_t and θ_t (q p_t − P c_t) / (1 − P), per token"""
    decay: Float[Tensor, "*chunks 1 1"]
    """(1 − α_1) a_1"""
    carry: Float[Tensor, "*chunks 1 1"]
    """q = η_1 c_1"""
    persist: Float[Tensor, "*chunks 1 1"]
    """P = η_1 p_1"""


def chunk_scalars(
    gates: Gates, mask: Bool[Tensor, "batch seq_len"], chunk_size: int, dtype: torch.dtype
) -> ChunkScalars:
    """Compute the scalar weights of all chunks in one pass, in float64: products of gates are sums of logarithms.

    On a device without float64, `mal_adapter.memory.gates32` computes them in float32 with the same accuracy.

    Args:
        gates: Logits, (batch, heads, seq_len) each.
        mask: At a False token θ = 0, η = 1, α = 0.
        chunk_size: Tokens per chunk; the last chunk is padded with such tokens.
        dtype: The dtype of the result.

    Returns:
        The scalars in the equations of `mal_adapter.memory.titans`, (batch, heads, chunks, …).

    Example:
        >>> half = Gates(*torch.zeros(3, 1, 1, 2))
        >>> scalars = chunk_scalars(half, torch.ones(1, 2, dtype=torch.bool), 2, torch.float32)
        >>> scalars.tokens[0, 0, 0, :, 0]          # θ_1 c_1 = ½ (a_1 + η_2 c_2), θ_2 c_2 = ½
        tensor([0.5000, 0.5000])
        >>> scalars.decay.item(), scalars.carry.item(), scalars.persist.item()
        (0.25, 0.5, 0.25)
    """
    batch, heads, seq_len = gates.step.shape
    padding = -seq_len % chunk_size
    logits = widen(torch.stack((gates.step, gates.momentum, -gates.forget))).clamp(-MAX_LOGIT, MAX_LOGIT)
    if padding:
        logits, mask = F.pad(logits, (0, padding)), F.pad(mask, (0, padding))
    valid = mask.view(batch, 1, -1, chunk_size)
    logits = logits.view(3, batch, heads, -1, chunk_size)
    if logits.dtype != torch.float64:
        tokens, whole_chunk = chunk_scalars_float32(logits, valid)
        return ChunkScalars(tokens.to(dtype), *whole_chunk.to(dtype)[..., None])
    log_gates = F.logsigmoid(logits) * valid
    log_theta = log_gates[0]

    until_t = log_gates[1:].cumsum(-1)  # log Π_{j≤t} η_j, log Π_{j≤t} (1 − α_j)
    whole = until_t[..., -1:]
    log_p, log_a = whole - until_t
    log_persist, log_decay = whole
    # c_t = Σ_{j≥t} m_j a_j Π_{t<i≤j} η_i. For m_j = 0 a term of −inf would turn the backward of logcumsumexp into NaN.
    terms = torch.where(valid, log_a + until_t[0], _LOG_ZERO)
    from_t = terms.flip(-1).logcumsumexp(-1).flip(-1)
    log_carry, log_c = from_t[..., :1], from_t - until_t[0]
    # q p_t − P c_t. The common terms j ≥ t are left out of both, instead of subtracted.
    before_t = F.pad(terms, (1, 0), value=_LOG_ZERO)[..., :-1].logcumsumexp(-1)
    log_friction = torch.expm1(log_persist).clamp_max(-torch.finfo(torch.float64).tiny).neg().log()  # of 1 − P
    log_later = log_p + before_t - log_friction

    tokens = (torch.stack((log_c, log_p, log_later), dim=-1) + log_theta[..., None]).exp() * valid[..., None]
    whole_chunk = torch.stack((log_decay, log_carry, log_persist)).exp().to(dtype)
    return ChunkScalars(tokens.to(dtype), *whole_chunk[..., None])
