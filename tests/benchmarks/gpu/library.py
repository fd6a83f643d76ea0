"""The memory's own functions on one problem: the fused kernels where they are, and the path in PyTorch."""

import importlib
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mal_adapter.memory import titans
from mal_adapter.memory.gates import Gates
from mal_adapter.memory.spans import Spans
from tests.benchmarks.gpu.world import Size

__all__ = ["Problem", "fused_kernels", "kernels_for", "problem", "read", "write"]

Layers = tuple[Tensor, ...]
CHUNK = 64


class Problem(NamedTuple):
    """The arguments of a write and the queries of a read; tokens of all rows in one flat list."""

    initial: Layers
    weights: Layers
    momentum: Layers
    keys: Tensor
    values: Tensor
    queries: Tensor
    gates: Gates
    spans: Spans
    valid: Tensor | None

    def floats(self) -> list[Tensor]:
        """All that has gradients."""
        layers = (*self.initial, *self.weights, *self.momentum)
        return [*layers, self.keys, self.values, self.queries, *self.gates]

    def of(self, floats: list[Tensor]) -> "Problem":
        """The same problem with other numbers; the inverse of `floats`."""
        depth = len(self.initial)
        parts = [tuple(floats[n * depth : (n + 1) * depth]) for n in range(3)]
        keys, values, queries, *gates = floats[3 * depth :]
        return Problem(*parts, keys, values, queries, Gates(*gates), self.spans, self.valid)

    def double(self) -> "Problem":
        """In float64."""
        return self.of([t.double() for t in self.floats()])

    def leaves(self) -> "Problem":
        """With gradients."""
        return self.of([t.detach().clone().requires_grad_() for t in self.floats()])


def problem(size: Size, device: torch.device, *, lengths: list[int] | None = None, masked: bool = False) -> Problem:
    """Random numbers of the kind that a trained memory sees."""
    generator = torch.Generator(device).manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    heads, d = size.heads, size.d
    shapes = [(d, d)] if size.depth == 1 else [(d, 2 * d), (2 * d, d)]
    spans = Spans(lengths or [size.seq_len] * size.batch, device)
    tokens = sum(spans.lengths)
    state = [tuple(0.1 * some(size.batch, heads, *s) / s[0] ** 0.5 for s in shapes) for _ in range(2)]
    keys, queries = (F.normalize(some(tokens, heads, d), dim=-1) for _ in range(2))
    gates = Gates(*(some(tokens, heads) + bias for bias in (-4.0, 0.0, -8.0)))
    valid = (some(tokens) > -0.8) if masked else None
    initial = tuple(some(heads, *s) / s[0] ** 0.5 for s in shapes)
    return Problem(initial, *state, keys, some(tokens, heads, d), queries, gates, spans, valid)


def fused_kernels() -> ModuleType | None:
    """The package of the fused kernels, in versions that have one."""
    try:
        return importlib.import_module("mal_adapter.memory.fused")
    except ModuleNotFoundError:
        return None


def kernels_for(p: Problem, chunk_size: int = CHUNK) -> ModuleType | None:
    """The fused kernels if they take this problem here; None where PyTorch does the work."""
    kernels = fused_kernels()
    if kernels is None:
        return None
    takes = kernels.takes_write(p.initial, p.keys, chunk_size) and kernels.takes_read(p.initial, p.queries)
    return kernels if takes else None


def write(p: Problem, kernels: ModuleType | None, chunk_size: int = CHUNK) -> list[Tensor]:
    """The new weights and momentum: by `kernels`, or in PyTorch."""
    if kernels is not None:
        new = kernels.write(p.initial, p.weights, p.momentum, p.keys, p.values, p.gates, p.spans, p.valid, chunk_size)
    else:
        keys, values = (_by_head(p.spans, t) for t in (p.keys, p.values))
        gates = Gates(*(p.spans.pad(g).mT for g in p.gates))
        mask = p.spans.inside if p.valid is None else p.spans.pad(p.valid)
        new = titans.write(p.initial, p.weights, p.momentum, keys, values, gates, mask, chunk_size)
    return [*new[0], *new[1]]


def read(p: Problem, kernels: ModuleType | None) -> Tensor:
    """The answer to each query, (tokens, heads, d): by `kernels`, or in PyTorch."""
    if kernels is not None:
        answers: Tensor = kernels.read(p.initial, p.weights, p.queries, p.spans)
        return answers
    weights = [w0 + w for w0, w in zip(p.initial, p.weights, strict=True)]
    answer = titans.read(weights, _by_head(p.spans, p.queries))
    return p.spans.flatten(answer.transpose(1, 2))


def _by_head(spans: Spans, tokens: Tensor) -> Tensor:
    return spans.pad(tokens).transpose(1, 2)
