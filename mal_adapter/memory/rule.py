"""The protocol of an update rule: how a memory is read, and what an utterance changes in it."""

from typing import Protocol

from jaxtyping import Bool, Float
from torch import Tensor

from mal_adapter.memory.gates import Gates
from mal_adapter.memory.spans import Spans
from mal_adapter.memory.state import MemoryState

__all__ = ["ByHead", "InitialWeights", "Rule", "TokensByHead", "Weights"]

Weights = tuple[Float[Tensor, "batch heads _d_in _d_out"], ...]
"""One tensor per memory layer."""

InitialWeights = tuple[Float[Tensor, "heads _d_in _d_out"], ...]
"""One tensor per memory layer, learned, for all dialogues."""

ByHead = Float[Tensor, "batch heads seq_len head_dim"]
"""A vector per token and head: keys, values, queries and answers."""

TokensByHead = Float[Tensor, "tokens heads head_dim"]
"""The same for rows of any length, one row after the other in a flat list."""


class Rule(Protocol):
    """An update rule. Each is an `nn.Module`, whose parameters, if it has any, are part of the adapter.

    `Titans`, `RunningMean`, `GRU` and `Unwritten` are the rules of `MemoryConfig.update`.
    """

    def read(self, initial: InitialWeights, state: MemoryState, queries: TokensByHead, spans: Spans) -> TokensByHead:
        """The memory's answer to each query.

        Args:
            initial: Learned initial weights.
            state: The weights' deviations from them.
            queries: One per token and head, of any length; only its direction counts.
            spans: Where each row's tokens are.
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
        """The weights and the momentum after one more utterance. `state` is not changed.

        Args:
            initial: Learned initial weights.
            state: The weights' deviations from them, the momentum, and how many utterances came before.
            keys: One per token and head, of any length; only its direction counts.
            values: One per token and head.
            gates: Logits, (tokens, heads) each.
            spans: Where each row's tokens are.
            valid: True at the tokens of the utterance; the others have no effect. All are if None.
        """
