"""Random writes and reads of ragged rows, and what float64 without any kernel makes of them, row by row."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mal_adapter.memory import fused
from mal_adapter.memory.gates import Gates
from mal_adapter.memory.spans import Spans
from mal_adapter.memory.titans import read, write

__all__ = ["Problem", "assert_close", "grads", "read_row_by_row", "write_row_by_row"]

STABLE = (-11.0, 0.0, -8.0)
"""Gates whose steps are short: the trust region does not bound them."""


class Problem(NamedTuple):
    """The arguments of a write; queries of a read are its keys."""

    initial: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    keys: Tensor
    values: Tensor
    gates: Gates
    valid: Tensor | None
    lengths: tuple[int, ...]
    chunk_size: int

    @classmethod
    def draw(
        cls,
        seed: int = 0,
        *,
        lengths: Sequence[int] = (20, 9),
        heads: int = 1,
        d: int = 16,
        h: int = 32,
        depth: int = 2,
        chunk_size: int = 16,
        gates: tuple[float, float, float] = STABLE,
        spread: float = 1.0,
        masked: Sequence[float] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> "Problem":
        """`masked` is the share of masked tokens of each row. What is stored at a masked token is NaN."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        rows, count = len(lengths), sum(lengths)
        shapes = ((d, d),) if depth == 1 else ((d, h), (h, d))
        initial = tuple((normal(heads, *s) / s[0] ** 0.5).to(device) for s in shapes)
        weights, momentum = (tuple((0.1 * normal(rows, heads, *s)).to(device) for s in shapes) for _ in range(2))
        # As the adapter's projections: keys, values and gates are columns of one tensor.
        both = torch.cat((F.normalize(normal(count, heads, d), dim=-1), normal(count, heads, d)), dim=2)
        logits = [spread * normal(count, heads) + gate for gate in gates]
        valid = None
        if masked is not None:
            shares = torch.tensor([share for share, length in zip(masked, lengths, strict=True) for _ in range(length)])
            valid = torch.rand(count, generator=generator) >= shares
            both[~valid] = float("nan")
            valid = valid.to(device)
        keys, values = both.to(device, dtype).split(d, dim=2)
        gate_logits = Gates(*torch.stack(logits, dim=2).to(device, dtype).unbind(2))
        return cls(initial, weights, momentum, keys, values, gate_logits, valid, tuple(lengths), chunk_size)

    @property
    def spans(self) -> Spans:
        return Spans(self.lengths, self.keys.device)

    def leaves(self) -> list[Tensor]:
        """Every float tensor."""
        return [*self.initial, *self.weights, *self.momentum, self.keys, self.values, *self.gates]

    def with_leaves(self, leaves: Sequence[Tensor]) -> "Problem":
        """The same with other tensors."""
        n, (keys, values, *gates) = len(self.initial), leaves[3 * len(self.initial) :]
        states = [tuple(leaves[i * n : (i + 1) * n]) for i in range(3)]
        return Problem(*states, keys, values, Gates(*gates), self.valid, self.lengths, self.chunk_size)  # type: ignore[arg-type]

    def for_gradients(self, dtype: torch.dtype | None = None) -> "Problem":
        """The same numbers, as leaves that require gradients, with the same layout unless a dtype is given."""
        if dtype is None:
            return self.with_leaves([t.detach().requires_grad_() for t in self.leaves()])
        return self.with_leaves([t.detach().to(dtype).requires_grad_() for t in self.leaves()])

    def write(self) -> list[Tensor]:
        """The kernels' weights and momentum."""
        inputs = (*self[:6], self.spans, self.valid, self.chunk_size)
        weights, momentum = fused.write(*inputs)
        return [*weights, *momentum]

    def read(self, normalize: bool = False) -> Tensor:
        """The kernels' answers."""
        return fused.read(self.initial, self.weights, self.keys, self.spans, normalize=normalize)


def write_row_by_row(problem: Problem) -> list[Tensor]:
    """`mal_adapter.memory.titans.write` of each row alone, in the dtype of the problem's tensors."""
    written: list[list[Tensor]] = []
    start = 0
    for row, length in enumerate(problem.lengths):
        here = slice(start, start + length)
        start += length
        valid = torch.ones(length, dtype=torch.bool) if problem.valid is None else problem.valid[here].cpu()
        valid = valid.to(problem.keys.device)

        def by_head(t: Tensor, here: slice = here, valid: Tensor = valid) -> Tensor:
            t = t[here]
            return torch.where(valid.view(-1, *[1] * (t.dim() - 1)), t, 0).transpose(0, 1)[None]

        weights, momentum = write(
            problem.initial,
            tuple(w[row : row + 1] for w in problem.weights),
            tuple(s[row : row + 1] for s in problem.momentum),
            by_head(problem.keys),
            by_head(problem.values),
            Gates(*map(by_head, problem.gates)),
            valid[None],
            problem.chunk_size,
        )
        written.append([*weights, *momentum])
    return [torch.cat(tensors) for tensors in zip(*written, strict=True)]


def read_row_by_row(problem: Problem, normalize: bool) -> Tensor:
    """`mal_adapter.memory.titans.read` of each row alone, in the dtype of the problem's tensors."""
    queries = F.normalize(problem.keys, dim=-1) if normalize else problem.keys
    answers = []
    for row, tokens in enumerate(queries.split(problem.lengths)):
        now = [w0 + w[row : row + 1] for w0, w in zip(problem.initial, problem.weights, strict=True)]
        answers.append(read(now, tokens.transpose(0, 1)[None])[0].transpose(0, 1))
    return torch.cat(answers)


def grads(outputs: Sequence[Tensor], problem: Problem, seed: int) -> list[Tensor]:
    """The derivative of a random sum of `outputs` with respect to every float tensor of the problem."""
    generator = torch.Generator().manual_seed(seed)
    directions = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
    return list(torch.autograd.grad(outputs, problem.leaves(), directions, materialize_grads=True))


def assert_close(ours: Sequence[Tensor], exact: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    """Each tensor within `tolerance` of float64's, in norm; a hundredth of the largest one counts to each norm."""
    largest = max(t.norm().item() for t in exact)
    errors = [((a.double() - b).norm() / (b.norm() + 1e-2 * largest)).item() for a, b in zip(ours, exact, strict=True)]
    assert all(error <= tolerance for error in errors), errors
