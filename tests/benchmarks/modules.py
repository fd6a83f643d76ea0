"""The memory of this library and its peers, as modules that do the same work for a sequence.

Each goes from (batch, seq_len, d) to what the memory answers and the memory afterwards: norm, projections to queries,
keys, values and gates, a read and a write. One head as wide as d, two layers, expansion 2.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mal_adapter.memory.gates import Gates
from mal_adapter.memory.titans import read, write

__all__ = ["Ours", "bare_gemms", "forward", "forward_backward", "titans_pytorch", "titans_unofficial"]


class Ours(nn.Module):
    """Per-token gates, as always."""

    def __init__(self, d: int, chunk_size: int) -> None:
        super().__init__()
        self.chunk_size = chunk_size
        self.norm = nn.RMSNorm(d)
        self.proj = nn.Linear(d, 3 * d + 3)
        with torch.no_grad():
            self.proj.bias[-3:] = torch.tensor([-4.0, 0.0, -8.0])
        self.initial = nn.ParameterList([torch.randn(1, d, 2 * d) / d**0.5, torch.randn(1, 2 * d, d) / (2 * d) ** 0.5])

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        query, key, value, gates = self.proj(self.norm(x)).unsqueeze(1).split([x.shape[-1]] * 3 + [3], dim=-1)
        zeros = tuple(w.new_zeros(len(x), *w.shape) for w in self.initial)
        initial = tuple(self.initial)
        answer = read([w.expand(len(x), *w.shape) for w in initial], F.normalize(query, dim=-1))
        mask = x.new_ones(x.shape[:2], dtype=torch.bool)
        key = F.normalize(key, dim=-1)
        weights, momentum = write(initial, zeros, zeros, key, value, Gates(*gates.unbind(-1)), mask, self.chunk_size)
        return answer.squeeze(1), [*weights, *momentum]


def titans_pytorch(d: int, chunk_size: int, heads: int = 1) -> nn.Module:
    """lucidrains/titans-pytorch: with chunks, gates are pooled per chunk and all gradients are at the first weights."""
    from titans_pytorch import NeuralMemory

    several = {"heads": heads, "dim_head": d} if heads > 1 else {}
    model = {"depth": 2, "expansion_factor": 2.0}
    memory = NeuralMemory(dim=heads * d, chunk_size=chunk_size, default_model_kwargs=model, **several)

    class Peer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = memory

        def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            answer, state = self.memory(x)
            return answer, list(state.updates.values())

    return Peer()


def titans_unofficial(d: int) -> nn.Module:
    """titans-unofficial: token by token, two layers as wide as d."""
    from titans.utils.memory import NeuralMemoryModule

    memory = NeuralMemoryModule(d, memory_depth=2)

    class Peer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = memory

        def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            answer, (weights, momentum) = self.memory(x)
            return answer, [*weights, *momentum]

    return Peer()


def forward(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """A call in inference."""

    def run() -> object:
        with torch.no_grad():
            return module(x)

    return run


def forward_backward(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """A call, and the derivative of the sum of its outputs with respect to parameters and input."""
    x = x.clone().requires_grad_()

    def run() -> None:
        module.zero_grad()
        x.grad = None
        answer, state = module(x)
        (answer.sum() + sum(t.sum() for t in state)).backward()

    return run


def bare_gemms(batch: int, seq_len: int, d: int, chunk_size: int, device: str, *, backward: bool) -> Callable[[], None]:
    """The matrix products that a write needs, and nothing between them."""
    h, tokens = 2 * d, min(chunk_size, seq_len)

    def some(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=device)

    key, e2, e1, a, twice = some(tokens, d), some(tokens, d), some(tokens, h), some(tokens, h), some(tokens, 2 * d)
    w1, w2, d_sums = some(d, h), some(h, d), some(2 * d, h)

    def run() -> None:
        for _ in range(seq_len // tokens):
            for left, right in ((key, w1), (a, w2), (e2, w2.mT), (twice.mT, e1), (a.mT, twice)):
                torch.bmm(left, right)
            if backward:
                for left, right in ((twice, d_sums), (e1, d_sums.mT), (twice, d_sums), (a, d_sums.mT)):
                    torch.bmm(left, right)
                for left, right in ((e1, w2), (e1.mT, e2), (e2, w2.mT), (a.mT, e2), (key.mT, e1), (e1, w1.mT)):
                    torch.bmm(left, right)

    return run
