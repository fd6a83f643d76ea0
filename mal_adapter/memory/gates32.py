"""The products of a chunk's gates in float32, to the accuracy of float32; for devices without float64.

`mal_adapter.memory.gates` takes differences of sums of logarithms, whose digits float32 would lose. Here nothing is
subtracted: products are sums of terms of one sign, recurrences are sums of positive terms, both computed by doubling
(Hillis and Steele, 1986), so that an error grows with log2 of the chunk's size. Only operations are used that every
device has and computes accurately; log1p, expm1 and logcumsumexp are not among them.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["chunk_scalars_float32"]

PerToken = Float[Tensor, "*chunks chunk_size"]
PerChunk = Float[Tensor, "*chunks 1"]

_LOG_ZERO = -1e9  # exp gives 0

_LOG_TINY = math.log(torch.finfo(torch.float32).tiny)

_ATANH_TERMS = 7
"""Terms of the series of log(1 + e), e ≤ 1: the rest is below half a unit in float32's last place."""


def chunk_scalars_float32(
    logits: Float[Tensor, "3 *chunks chunk_size"], valid: Bool[Tensor, "*#chunks chunk_size"]
) -> tuple[Float[Tensor, "*chunks chunk_size 3"], Float[Tensor, "3 *chunks 1"]]:
    """Compute the fields of `mal_adapter.memory.gates.ChunkScalars`: `tokens`; and decay, carry and persist, stacked.

    Args:
        logits: The logits of θ, η and 1 − α, clamped.
        valid: At a False token θ = 0, η = 1, α = 0.
    """
    shape = logits.shape[1:-1]
    # MPS reduces tensors of up to four dimensions only.
    logits, valid = logits.flatten(1, -2), valid.expand(logits.shape[1:]).flatten(0, -2)
    gates = torch.stack((logits[1], logits[2], -logits[1]))
    log_eta, log_keep, log_friction = (_LogSigmoid.apply(gates) * valid).unbind(0)  # type: ignore[no-untyped-call]

    until_t, log_a_back = _running_sums(torch.stack((log_eta, _later_first(log_keep)))).unbind(0)
    a = log_a_back.flip(-1).exp()
    # c_t = m_t a_t + η_{t+1} c_{t+1}, from the last token on; p_t is the product of the same factors
    log_p_back, c_back = _recur(_later_first(log_eta), (a * valid).flip(-1))
    log_p, c = log_p_back.flip(-1), c_back.flip(-1)
    # θ (q p_t − P c_t) = θ p_t Σ_{j<t} m_j a_j Π_{i≤j} η_i, and 1 − P = Σ_t (1 − η_t) Π_{i<t} η_i
    arrived = _running_sums(_shift(a * valid * until_t.exp()))
    lost = torch.where(valid, log_friction + _shift(until_t), _LOG_ZERO).logsumexp(-1, keepdim=True)
    later = (log_p - lost.clamp_min(_LOG_TINY)).exp() * arrived

    theta = logits[0].sigmoid() * valid
    tokens = torch.stack((c, log_p.exp(), later), dim=-1) * theta[..., None]
    carry = log_eta[..., :1].exp() * c[..., :1]
    decay, persist = (log_keep[..., :1] + log_a_back[..., -1:]).exp(), until_t[..., -1:].exp()
    return torch.unflatten(tokens, 0, shape), torch.unflatten(torch.stack((decay, carry, persist)), 1, shape)


def _shift(x: PerToken) -> PerToken:
    """x_{t−1}, zero for the first."""
    return F.pad(x[..., :-1], (1, 0))


def _later_first(x: PerToken) -> PerToken:
    """x_{t+1} from the last token to the first, zero for the last."""
    return _shift(x.flip(-1))


def _running_sums(x: PerToken) -> PerToken:
    """Σ_{j≤t} x_j"""
    reach = 1
    while reach < x.shape[-1]:
        x = x + F.pad(x[..., :-reach], (reach, 0))
        reach *= 2
    return x


def _recur(log_decay: PerToken, terms: PerToken) -> tuple[PerToken, PerToken]:
    """log Π_{j≤t} decay_j, and y_t = terms_t + decay_t y_{t−1}. In the loop, both cover the last `reach` tokens."""
    reach = 1
    while reach < terms.shape[-1]:
        terms = torch.addcmul(terms, log_decay.exp(), F.pad(terms[..., :-reach], (reach, 0)))
        log_decay = log_decay + F.pad(log_decay[..., :-reach], (reach, 0))
        reach *= 2
    return log_decay, terms


class _LogSigmoid(torch.autograd.Function):
    """log σ(x) = min(x, 0) − log(1 + e) with e = exp(−|x|), and log(1 + e) = 2 artanh(e / (2 + e)).

    Some devices compute log1p and logsigmoid by adding e to 1, which loses the digits of a gate near 1.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        e = x.abs().neg().exp()
        s = e / (e + 2)
        square = s * s
        series = torch.zeros_like(s)
        for n in reversed(range(_ATANH_TERMS)):
            series = series * square + 1 / (2 * n + 1)
        return x.clamp_max(0) - 2 * s * series

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        x: Tensor
        (x,) = ctx.saved_tensors
        return d_out * (-x).sigmoid()
