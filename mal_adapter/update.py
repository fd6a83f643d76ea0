"""The Titans update in closed form: functions on tensors, for a memory of one matrix or a two-layer MLP.

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

`mal_adapter.gates` has the scalars, `mal_adapter.chunk` the sums and their derivative; `mal_adapter.reference` says the
same token by token.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mal_adapter.chunk import WriteChunk, advance, full_precision, side
from mal_adapter.gates import ChunkScalars, Gates, chunk_scalars

__all__ = ["Weights", "read", "write"]

Weights = tuple[Tensor, ...]
"""One tensor per memory layer, (batch, heads, d_in, d_out)."""

_SLAB = 1 << 18
"""Elements of a chunk's widest tensor that are worked on together, to stay in the processor's cache."""


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

    Differentiable once in every float argument. Where no gradient is recorded, the chunks work in place on one copy of
    the state. The arguments themselves are never changed.

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
    if keys.shape[-2] == 0:
        return weights, momentum
    with full_precision(keys.device):
        return _write(initial, weights, momentum, keys, values, gates, mask, min(chunk_size, keys.shape[-2]))


def _write(
    initial: Weights,
    weights: Weights,
    momentum: Weights,
    keys: Tensor,
    values: Tensor,
    gates: Gates,
    mask: Tensor,
    chunk_size: int,
) -> tuple[Weights, Weights]:
    scalars = chunk_scalars(gates, mask, chunk_size, keys.dtype)
    joint = [torch.cat((w, s), dim=side(w)) for w, s in zip(weights, momentum, strict=True)]

    # Rows do not meet, so a few at a time go through all of their chunks.
    rows = max(1, _SLAB // (keys.shape[1] * chunk_size * initial[0].shape[-1]))
    slabs = zip(*(torch.split(t, rows) for t in (keys, values, mask[:, None, :, None], *scalars, *joint)), strict=True)
    written = [_write_slab(initial, slab, chunk_size) for slab in slabs]
    if torch.is_grad_enabled():
        joint = [torch.cat(parts) for parts in zip(*written, strict=True)] if len(written) > 1 else written[0]
    apart = [t.chunk(2, dim=side(w)) for t, w in zip(joint, weights, strict=True)]
    return tuple(w for w, _ in apart), tuple(s for _, s in apart)


def _write_slab(initial: Weights, slab: tuple[Tensor, ...], chunk_size: int) -> list[Tensor]:
    """Weights and momentum of some rows after all of their chunks; in place where no gradient is recorded."""
    heads = len(initial[0])
    keys, values, mask, *scalars = slab[:7]
    # Padding meets weights of zero, but zero times an overflow would still be NaN.
    keys, values = ((t * mask).flatten(0, 1) for t in (keys, values))
    joint = [t.flatten(0, 1) for t in slab[7:]]
    per_chunk = zip(*(s.flatten(0, 1).unbind(1) for s in scalars), strict=True)
    for k, v, chunk in zip(*(torch.split(t, chunk_size, dim=1) for t in (keys, values)), per_chunk, strict=True):
        tokens, *whole = chunk
        tokens = tokens[:, : k.shape[1]]
        if torch.is_grad_enabled():
            joint = list(WriteChunk.apply(k, v, tokens, *whole, *initial, *joint))  # type: ignore[no-untyped-call]
        else:
            advance(initial, joint, k, v, ChunkScalars(tokens, *whole))
    return [torch.unflatten(t, 0, (-1, heads)) for t in joint]
