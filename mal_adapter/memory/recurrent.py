"""The simple memories that a neural one has to beat: a running mean of the utterances, and a GRU over them.

Both keep one vector per head, take the mean of an utterance's values as their input, and answer every query alike.
They share everything else with the Titans memory (norm, projections, read-out, sessions, files), so a comparison is of
the update rule alone. `MemoryConfig(update="running_mean")` or `"gru"` chooses one.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mal_adapter.memory.config import MemoryConfig
from mal_adapter.memory.gates import Gates
from mal_adapter.memory.rule import InitialWeights, TokensByHead, Weights
from mal_adapter.memory.spans import Spans
from mal_adapter.memory.state import MemoryState

__all__ = ["GRU", "RunningMean"]

Vectors = Float[Tensor, "batch heads 1 head_dim"]
"""One vector per head."""


class _OneVector(nn.Module):
    """A rule whose memory is one vector per head; `forward` computes the next one."""

    def read(self, initial: InitialWeights, state: MemoryState, queries: TokensByHead, spans: Spans) -> TokensByHead:
        """The vector itself, for every query."""
        return spans.spread((initial[0] + state.weights[0]).squeeze(2))

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
        """Update the vector by the mean of the valid `values`. Keys and gates are not used; the momentum stays."""
        (start,), (deviation,) = initial, state.weights
        mask = (spans.inside if valid is None else spans.pad(valid))[:, None, :, None]
        utterance = (spans.pad(values).transpose(1, 2) * mask).sum(-2, keepdim=True)
        utterance = utterance / mask.sum(-2, keepdim=True).clamp_min(1)
        memory = self(start + deviation, utterance, state.utterances)
        return (torch.where(mask.any(-2, keepdim=True), memory - start, deviation),), state.momentum


class RunningMean(_OneVector):
    """m_n = m_{n−1} + r_n (v̄_n − m_{n−1}) with r_n = max(1/n, r): a mean that becomes an exponential one.

    Args:
        config: Its `num_heads` is used. Each head learns its own r, which starts at 0.05.

    Example:
        >>> mean = RunningMean(MemoryConfig(hidden_size=8, memory_dim=2, num_heads=1))
        >>> memory = torch.zeros(1, 1, 1, 2)
        >>> for n, value in enumerate((1.0, 3.0, 5.0)):
        ...     memory = mean(memory, torch.full((1, 1, 1, 2), value), torch.tensor([n]))
        >>> memory.flatten().tolist()
        [3.0, 3.0]
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.full((config.num_heads, 1, 1), math.log(0.05 / 0.95)))

    def forward(self, memory: Vectors, utterance: Vectors, utterances_before: Int[Tensor, " batch"]) -> Vectors:
        """The memory after one more utterance.

        Args:
            memory: (batch, heads, 1, head_dim).
            utterance: The mean of its values, (batch, heads, 1, head_dim).
            utterances_before: How many utterances were written before, (batch,).
        """
        first = 1.0 / (1.0 + utterances_before.to(memory.dtype)).view(-1, 1, 1, 1)
        rate = torch.maximum(first, self.rate.to(memory.dtype).sigmoid())
        return torch.lerp(memory, utterance, rate)


class GRU(_OneVector):
    """A gated recurrent unit as wide as all heads together.

    Args:
        config: Its `memory_dim` is used.

    Example:
        >>> gru = GRU(MemoryConfig(hidden_size=8, memory_dim=4, num_heads=2))
        >>> tuple(gru(torch.zeros(1, 2, 1, 2), torch.ones(1, 2, 1, 2), torch.tensor([0])).shape)
        (1, 2, 1, 2)
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.cell = nn.GRUCell(config.memory_dim, config.memory_dim)

    def forward(self, memory: Vectors, utterance: Vectors, utterances_before: Int[Tensor, " batch"]) -> Vectors:
        """The memory after one more utterance; arguments as in `RunningMean.forward`, of which the last is not used."""
        # nn.GRUCell itself needs the state in the parameters' dtype, which may be half precision.
        parameters = (p.to(memory.dtype) for p in self.cell.parameters())
        return torch.gru_cell(utterance.flatten(1), memory.flatten(1), *parameters).view_as(memory)
