"""The simple memories that a neural one has to beat: a running mean of the utterances, and a GRU over them.

Both keep one vector per head, take in an utterance at once as the mean of its values, and answer every query alike. All
else (norm, projections, read-out, sessions, files) they share with the Titans memory, so a comparison is of the memory
alone. `MemoryConfig(update="running_mean")` or `"gru"` chooses one.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mal_adapter.memory.config import MemoryConfig

__all__ = ["GRU", "RunningMean", "recurrence"]


class RunningMean(nn.Module):
    """m_n = m_{n−1} + r_n (v̄_n − m_{n−1}) with r_n = max(1/n, r): a mean that becomes an exponential one.

    Args:
        config: for the number of heads, each of which learns its r; it starts at 0.05.

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

    def forward(
        self,
        memory: Float[Tensor, "batch heads 1 head_dim"],
        utterance: Float[Tensor, "batch heads 1 head_dim"],
        heard: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch heads 1 head_dim"]:
        """The memory after `utterance`, both (batch, heads, 1, head_dim); `heard` (batch,) counts those before it."""
        first = 1.0 / (1.0 + heard.to(memory.dtype)).view(-1, 1, 1, 1)
        rate = torch.maximum(first, self.rate.to(memory.dtype).sigmoid())
        return torch.lerp(memory, utterance, rate)


class GRU(nn.Module):
    """A gated recurrent unit as wide as all heads together.

    Args:
        config: for the width.
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.cell = nn.GRUCell(config.memory_dim, config.memory_dim)

    def forward(
        self,
        memory: Float[Tensor, "batch heads 1 head_dim"],
        utterance: Float[Tensor, "batch heads 1 head_dim"],
        heard: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch heads 1 head_dim"]:
        """The memory after `utterance`, both (batch, heads, 1, head_dim)."""
        # nn.GRUCell itself would want the state in the parameters' dtype, which may be half precision.
        parameters = (p.to(memory.dtype) for p in self.cell.parameters())
        return torch.gru_cell(utterance.flatten(1), memory.flatten(1), *parameters).view_as(memory)


def recurrence(config: MemoryConfig) -> RunningMean | GRU | None:
    """The module that `config.update` asks for; None for the Titans update, which has no parameters of its own."""
    if config.update == "titans":
        return None
    return GRU(config) if config.update == "gru" else RunningMean(config)
