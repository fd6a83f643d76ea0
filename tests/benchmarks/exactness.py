"""How far the closed form is from the token-by-token reference, and float32 from float64 after many utterances."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from mal_adapter.memory.gates import Gates
from mal_adapter.memory.reference import write_by_token
from mal_adapter.memory.titans import write
from tests.benchmarks.rows import Row

UTTERANCES = 500


def exactness(device: str, seconds: float) -> Iterator[Row]:
    """No times: the largest differences, divided by the largest number."""
    for depth in (1, 2):
        values, gradients = _against_reference(depth)
        size = f"depth {depth}, B2 T150 d16, chunk 64, float64"
        yield Row("write - reference, values", size, values, "≤", 1e-12)
        yield Row("write - reference, gradients", size, gradients, "≤", 1e-12)
        name = f"float32 - float64 after {UTTERANCES} utterances"
        yield Row(name, f"depth {depth}, T50 d32", _drift(depth, device), "≤", 5e-6)


def _problem(depth: int, batch: int, seq_len: int, d: int) -> list[Tensor]:
    """Initial weights, keys, values and gate logits near their values at the start of training, in float64."""
    shapes = [(d, d)] if depth == 1 else [(d, 2 * d), (2 * d, d)]
    initial = [torch.randn(2, *shape, dtype=torch.float64) / shape[0] ** 0.5 for shape in shapes]
    keys, values = torch.randn(2, batch, 2, seq_len, d, dtype=torch.float64)
    logits = (
        torch.randn(3, batch, 2, seq_len, dtype=torch.float64) + torch.tensor([-4.0, 0.0, -7.0])[:, None, None, None]
    )
    return [*initial, torch.nn.functional.normalize(keys, dim=-1), values, *logits]


def _against_reference(depth: int) -> tuple[float, float]:
    torch.manual_seed(depth)
    tensors = [t.requires_grad_() for t in _problem(depth, 2, 150, 16)]
    mask = torch.rand(2, 150) > 0.1
    found = []
    for function in (write, write_by_token):
        initial, (keys, values), logits = tuple(tensors[:depth]), tensors[depth : depth + 2], tensors[depth + 2 :]
        zeros = tuple(w.new_zeros(2, *w.shape) for w in initial)
        new = list(itertools.chain(*function(initial, zeros, zeros, keys, values, Gates(*logits), mask, 64)))
        loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in new)
        found.append((new, torch.autograd.grad(loss, tensors)))
    values_off, gradients_off = (
        max(_difference(ours, theirs) for ours, theirs in zip(*both, strict=True)) for both in zip(*found, strict=True)
    )
    return values_off, gradients_off


def _difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def _drift(depth: int, device: str) -> float:
    torch.manual_seed(depth)
    initial = tuple(_problem(depth, 1, 1, 32)[:depth])
    exact = rounded = tuple(w.new_zeros(1, *w.shape) for w in initial), tuple(w.new_zeros(1, *w.shape) for w in initial)
    mask = torch.ones(1, 50, dtype=torch.bool)
    rounded = tuple(tuple(t.to(device, torch.float32) for t in part) for part in rounded)
    for _ in range(UTTERANCES):
        _, *rest = _problem(1, 1, 50, 32)
        exact = _write(initial, exact, rest, mask)
        rounded = _write(
            tuple(w.to(device, torch.float32) for w in initial),
            rounded,
            [t.to(device, torch.float32) for t in rest],
            mask.to(device),
        )
    pairs = list(zip(itertools.chain(*exact), itertools.chain(*rounded), strict=True))
    return max(_difference(r.cpu().double(), e) for e, r in pairs)


def _write(initial, state, rest, mask):  # type: ignore[no-untyped-def]
    keys, values, *logits = rest
    return write(initial, *state, keys, values, Gates(*logits), mask, 64)
