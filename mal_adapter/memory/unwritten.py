"""The control of a memory: the same adapter, but its memory is always empty.

A memory's read-out also sees the token itself. Training it mends the host, with or without a past, so a gain over the
host alone says nothing about the memory. This control has the same parameters and is trained in the same way, and what
a memory gains over it comes from the past. `MemoryConfig(update="none")` chooses it. `update="answers"` is the same
beside past answers, which are kept apart from it (`AnswerMemory`).
"""

import torch
from jaxtyping import Bool
from torch import Tensor

from mal_adapter.memory.commit import total
from mal_adapter.memory.gates import Gates
from mal_adapter.memory.rule import InitialWeights, TokensByHead, Weights
from mal_adapter.memory.spans import Spans
from mal_adapter.memory.state import MemoryState
from mal_adapter.memory.titans import Titans

__all__ = ["Unwritten"]


class Unwritten(Titans):
    """The Titans memory without its write: every read is that of the learned initial weights.

    Example:
        >>> from mal_adapter import MemoryAdapter, MemoryConfig
        >>> adapter = MemoryAdapter(MemoryConfig(hidden_size=8, memory_dim=4, num_heads=1, update="none")).eval()
        >>> state = adapter.write(adapter.initial_state(), torch.randn(1, 5, 8))
        >>> state.utterances.item(), state.tokens.item(), state.weights[0].any().item()
        (1, 5, False)
    """

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
        """The weights and the momentum as they are; NaN for a row whose values are not finite, which skips it."""
        finite = total(values, (-2, -1)).isfinite()
        rows = spans.all_by_row(finite if valid is None else finite | ~valid)[:, None, None, None]
        weights = tuple(torch.where(rows, layer, torch.nan) for layer in state.weights)
        return weights, state.momentum
