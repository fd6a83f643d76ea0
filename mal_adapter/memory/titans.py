"""The Titans update in closed form: functions on tensors, for a memory of one matrix or a two-layer MLP.

Per token t of a chunk, with all gradients taken at the weights the chunk starts with (arXiv 2501.00663, eqs. 9, 10,
13, 14):

    G_t = ∇ ½‖M(k_t) − v_t‖²
    S_t = η_t S_{t−1} − θ_t G_t
    M_t = (1 − α_t) M_{t−1} + m_t S_t         m_t = 0 at padding, where also θ = 0, η = 1, α = 0

M and S are deviations from the learned initial weights, so forgetting leads back to those and not to zero. The G_t
of a chunk do not depend on one another. So the state at the chunk's end is a weighted sum of them, and no weights per
token are needed:

    a_t = Π_{j>t} (1 − α_j)       p_t = Π_{j>t} η_j       c_t = m_t a_t + η_{t+1} c_{t+1}
    M_T = ((1 − α_1) a_1) M_0 + (η_1 c_1) S_0 − Σ θ_t c_t G_t
    S_T = (η_1 p_1) S_0 − Σ θ_t p_t G_t

`mal_adapter.memory.gates` computes the scalars, `mal_adapter.memory.chunk` the sums and their derivative;
`mal_adapter.memory.reference` computes the same token by token.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mal_adapter.memory import fused
from mal_adapter.memory.chunk import Initial, Memory, Vector, WriteChunk, advance, split_chunks
from mal_adapter.memory.config import MemoryConfig
from mal_adapter.memory.gates import ChunkScalars, Gates, chunk_scalars
from mal_adapter.memory.precision import full_precision
from mal_adapter.memory.rule import ByHead, InitialWeights, TokensByHead, Weights
from mal_adapter.memory.spans import Spans
from mal_adapter.memory.state import MemoryState

__all__ = ["Titans", "read", "write"]

_SLAB = 1 << 18
"""Elements of a chunk's widest tensor that are processed together, so that they fit into the processor's cache."""


class Titans(nn.Module):
    """The Titans rule: gradient steps with momentum and forgetting. It has no parameters of its own.

    Args:
        config: Its `chunk_size` is used.

    Example:
        >>> from mal_adapter import MemoryAdapter
        >>> adapter = MemoryAdapter(MemoryConfig(hidden_size=8, memory_dim=4, num_heads=1)).eval()
        >>> queries, spans = torch.randn(5, 1, 4), Spans([5], torch.device("cpu"))
        >>> adapter.rule.read(tuple(adapter.initial), adapter.initial_state(), queries, spans).any().item()
        False
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.chunk_size = config.chunk_size

    def read(self, initial: InitialWeights, state: MemoryState, queries: TokensByHead, spans: Spans) -> TokensByHead:
        """M(q), see `read`."""
        if fused.takes_read(initial, queries):
            return fused.read(initial, state.weights, queries, spans, normalize=True)
        weights = [w0 + w for w0, w in zip(initial, state.weights, strict=True)]
        queries = _heads_first(F.normalize(queries, dim=-1), spans)
        return spans.flatten(read(weights, queries).transpose(1, 2))

    def write(
        self,
        initial: InitialWeights,
        state: MemoryState,
        keys: TokensByHead,
        values: TokensByHead,
        gates: Gates,
        spans: Spans,
        valid: Bool[Tensor, " tokens"] | None,
    ) -> tuple[Weights, Weights]:
        """The weights and the momentum after one more utterance, see `write`."""
        keys = F.normalize(keys, dim=-1)
        if fused.takes_write(initial, keys, self.chunk_size):
            state_and_tokens = (state.weights, state.momentum, keys, values, gates, spans, valid)
            return fused.write(initial, *state_and_tokens, self.chunk_size)
        keys, values = (_heads_first(t, spans) for t in (keys, values))
        gates = Gates(*(spans.pad(logits).mT for logits in gates))
        mask = spans.inside if valid is None else spans.pad(valid)
        return write(initial, state.weights, state.momentum, keys, values, gates, mask, self.chunk_size)


def _heads_first(tokens: TokensByHead, spans: Spans) -> ByHead:
    return spans.pad(tokens).transpose(1, 2)


def read(weights: Sequence[Float[Tensor, "batch heads _d_in _d_out"]], queries: ByHead) -> ByHead:
    """M(q): the memory's answers.

    Args:
        weights: One or two layers: the sums of initial weights and deviations.
        queries: One per token and head.

    Example:
        >>> eye = torch.eye(2).view(1, 1, 2, 2)
        >>> read((eye,), torch.tensor([[[[3.0, 4.0]]]]))
        tensor([[[[3., 4.]]]])
    """
    hidden = queries @ weights[0]
    return hidden if len(weights) == 1 else F.silu(hidden) @ weights[1]


def write(
    initial: InitialWeights,
    weights: Weights,
    momentum: Weights,
    keys: ByHead,
    values: ByHead,
    gates: Gates,
    mask: Bool[Tensor, "batch seq_len"],
    chunk_size: int,
) -> tuple[Weights, Weights]:
    """Write the pairs (keys, values) into the memory, `chunk_size` tokens per gradient step.

    Differentiable once with respect to every float argument. If no gradient is recorded, the chunks change one copy of
    the state in place. The arguments themselves are never changed.

    Args:
        initial: Learned initial weights.
        weights: Deviations from `initial`.
        momentum: Shapes as of `weights`.
        keys: Finite.
        values: Finite.
        gates: Logits.
        mask: Tokens with False have no effect.
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
    initial: InitialWeights,
    weights: Weights,
    momentum: Weights,
    keys: ByHead,
    values: ByHead,
    gates: Gates,
    mask: Bool[Tensor, "batch seq_len"],
    chunk_size: int,
) -> tuple[Weights, Weights]:
    scalars = chunk_scalars(gates, mask, chunk_size, keys.dtype)
    learned = torch.stack(_transpose_second(initial), dim=1)
    both = zip(_transpose_second(weights), _transpose_second(momentum), strict=True)
    memory = torch.unflatten(torch.stack(list(itertools.chain(*both)), dim=2), 2, (-1, 2))
    # (batch, heads, layers, 2, d, h): weights and momentum of a layer are neighbours

    # Padding has weight zero, but zero times an overflow would be NaN.
    keys, values = (t * mask[:, None, :, None] for t in (keys, values))

    # Rows are independent, so all chunks of a few rows are processed before the next rows.
    batch, heads = keys.shape[:2]
    rows = max(1, _SLAB // (heads * chunk_size * learned.shape[-1]))
    slabs = zip(*(torch.split(t.flatten(0, 1), heads * rows) for t in (memory, keys, values, *scalars)), strict=True)
    written = [_write_slab(learned, *slab) for slab in slabs]
    if torch.is_grad_enabled():
        memory = torch.unflatten(torch.cat(written) if len(written) > 1 else written[0], 0, (batch, heads))
    new_weights, new_momentum = memory.unbind(3)
    return _transpose_second(new_weights.unbind(2)), _transpose_second(new_momentum.unbind(2))


def _transpose_second(layers: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Transpose the second layer, so that both layers have one shape. The function is its own inverse."""
    return (layers[0], *(layer.mT for layer in layers[1:]))


def _write_slab(initial: Initial, memory: Memory, keys: Vector, values: Vector, *scalars: Tensor) -> Memory:
    """The memory of some rows after all of their chunks; changed in place if no gradient is recorded."""
    for chunk in split_chunks(keys, values, ChunkScalars(*scalars)):
        if torch.is_grad_enabled():
            memory = WriteChunk.apply(initial, memory, *chunk)  # type: ignore[no-untyped-call]
        else:
            advance(initial, memory, chunk)
    return memory
