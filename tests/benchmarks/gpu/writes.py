"""The write alone, fused and in PyTorch, and how exact both are."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from mal_adapter import MemoryAdapter
from tests.benchmarks.gpu.figures import Figure, short
from tests.benchmarks.gpu.library import Problem, kernels_for, problem, read, write
from tests.benchmarks.gpu.world import Budget, Size, World

__all__ = ["SWITCH", "in_pytorch", "precision", "write_and_backward", "writes"]

SWITCH = "MAL_ADAPTER_FUSED"

# Version 0.1.0 on an H200, in ms (Python call): forward, and forward with backward.
_COLUMNS = tuple((batch, seq_len) for batch in (1, 8, 32) for seq_len in (250, 1500))
_BEFORE = {
    (4, 64, 2): ((2.339, 8.605, 2.294, 8.432, 6.520, 32.007), (7.9, 29.8, 8.0, 37.8, 25.0, 139.6)),
    (4, 64, 1): ((), (5.3, 15.4, 5.5, 17.4, 9.3, 26.8)),
    (1, 128, 2): ((2.523, None, None, None, None, 17.212), ()),
}
_TARGETS = {(4, 64, 2, 1, 250): 0.12, (4, 64, 2, 32, 1500): 1.4}


@contextmanager
def in_pytorch() -> Iterator[None]:
    """Within this block the library uses no fused kernel."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "0"
    try:
        yield
    finally:
        os.environ.pop(SWITCH)
        if before is not None:
            os.environ[SWITCH] = before


def writes(world: World, budget: Budget) -> Iterator[Figure]:
    """The grid of writes: the device's time by a CUDA graph, and the Python call beside PyTorch's."""
    clock = world.clock
    for size in world.scale.writes:
        budget.check(str(size))
        given = problem(size, clock.device)
        kernels = kernels_for(given)
        with torch.no_grad():
            run = _inference(given, kernels)
            error = _error(run(), given)
            call = clock.call(run, seconds=world.seconds(0.2, budget))
            with in_pytorch():
                plain = clock.call(_inference(given, None), seconds=world.seconds(0.3, budget))
            alone, why = (math.nan, "") if kernels is None else clock.graph_or_reason(run)
        numbers = {
            "graph_ms": None if math.isnan(alone) else alone,
            "call_ms": call,
            "pytorch_call_ms": plain,
            "error": error,
        }
        name = "write, fused" if kernels is not None else "write, in PyTorch"
        note = f"Python call {short(call)} ms; PyTorch {short(plain)} ms; error {error:.1e} {why}".rstrip()
        target = _TARGETS.get((size.heads, size.d, size.depth, size.batch, size.seq_len))
        value = call if math.isnan(alone) else alone
        yield Figure(name, str(size), value, "ms", _before(size, 0), target, note=note, numbers=numbers)

        given = given.leaves()
        kernels = kernels_for(given)
        step, plain_step = write_and_backward(given, kernels), write_and_backward(given, None)
        call = clock.call(step, seconds=world.seconds(0.2, budget))
        with in_pytorch():
            plain = clock.call(plain_step, seconds=world.seconds(0.3, budget))
        alone, why = (math.nan, "") if kernels is None else clock.graph_or_reason(step)
        numbers = {"graph_ms": None if math.isnan(alone) else alone, "call_ms": call, "pytorch_call_ms": plain}
        note = f"Python call {short(call)} ms; PyTorch {short(plain)} ms {why}".rstrip()
        value = call if math.isnan(alone) else alone
        yield Figure(f"{name}, with backward", str(size), value, "ms", _before(size, 1), note=note, numbers=numbers)


def _before(size: Size, mode: int) -> str:
    times = _BEFORE.get((size.heads, size.d, size.depth), ((), ()))[mode]
    at = (size.batch, size.seq_len)
    found = dict(zip(_COLUMNS, times, strict=False)).get(at)
    return "" if found is None else f"{found:.3g} ms"


def _inference(given: Problem, kernels: ModuleType | None) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        with torch.no_grad():
            return write(given, kernels)

    return run


def write_and_backward(given: Problem, kernels: ModuleType | None) -> Callable[[], list[Tensor]]:
    """A write and the derivative of a weighted sum of its results by all that it was given."""
    leaves = [t for t in given.floats() if t is not given.queries]
    with torch.no_grad():
        into = [torch.linspace(-1, 1, t.numel(), device=t.device, dtype=t.dtype).view(t.shape) for t in
                (*given.weights, *given.momentum)]  # fmt: skip

    def run() -> list[Tensor]:
        with torch.enable_grad():
            return list(torch.autograd.grad(write(given, kernels), leaves, into))

    return run


def _error(found: list[Tensor], given: Problem) -> float:
    with in_pytorch():
        return worst(found, write(given.double(), None))


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of a tensor in norm, relative to that of what is expected; infinite if it is not finite."""
    errors = [
        float((f.double() - e.double()).norm() / e.double().norm().clamp_min(1e-30))
        for f, e in zip(found, expected, strict=True)
    ]
    return max(e if e == e else float("inf") for e in errors)


def precision(world: World, budget: Budget) -> Iterator[Figure]:
    """Values and gradients against float64, on rows of several lengths with a mask; and what the switch changes."""
    for size in _smallest_of_each(world.scale.writes):
        budget.check(str(size))
        lengths = [size.seq_len, size.seq_len // 3 + 1, 1]
        size = Size(size.heads, size.d, size.depth, len(lengths), size.seq_len)
        given = problem(size, world.clock.device, lengths=lengths, masked=True)
        yield from _errors(f"{size.heads}×{size.d}, depth {size.depth}, T{lengths}, masked", given)
    budget.check("the switch")
    yield from _switch(world)


def _smallest_of_each(sizes: tuple[Size, ...]) -> list[Size]:
    return list({(size.heads, size.d, size.depth): size for size in reversed(sizes)}.values())[::-1]


def _errors(label: str, given: Problem) -> Iterator[Figure]:
    kernels = kernels_for(given)
    what = "fused" if kernels is not None else "in PyTorch"
    leaves, exact = given.leaves(), given.double().leaves()
    with in_pytorch():
        reference = _results(exact, None)
        plain = _results(leaves, None)
    found, again = _results(leaves, kernels), _results(leaves, kernels)
    # float32's own error is 2 to 5e-7 in values and 2e-6 in gradients; tf32's is 1.5e-3.
    for name, target in (
        ("write", 1e-6),
        ("gradients of a write", 2e-6),
        ("read", 1e-6),
        ("gradients of a read", 2e-6),
    ):
        error, own = worst(found[name], reference[name]), worst(plain[name], reference[name])
        note = f"PyTorch in float32 {own:.1e}; {what} − PyTorch {worst(found[name], plain[name]):.1e}"
        yield Figure(f"{name}, {what}, error against float64", label, error, "", "", target, note=note)
    differing = sum(
        not torch.equal(a, b) for name in found for a, b in zip(found[name], again[name], strict=True)
    )  # fmt: skip
    yield Figure(f"tensors that differ between two runs, {what}", label, differing, "", "", 0)


def _results(given: Problem, kernels: ModuleType | None) -> dict[str, list[Tensor]]:
    with torch.no_grad():
        new, answer = write(given, kernels), read(given, kernels)
    back = write_and_backward(given, kernels)()
    with torch.enable_grad():
        into = torch.linspace(-1, 1, answer.numel(), device=answer.device, dtype=answer.dtype).view(answer.shape)
        by = [*given.initial, *given.weights, given.queries]
        read_back = list(torch.autograd.grad(read(given, kernels), by, into))
    return {"write": new, "gradients of a write": back, "read": [answer], "gradients of a read": read_back}


def _switch(world: World) -> Iterator[Figure]:
    """The whole adapter with and without fused kernels: three utterances, then a read; and its gradients."""
    torch.manual_seed(0)
    adapter = MemoryAdapter(dataclasses.replace(world.scale.memory, hidden_size=64)).to(world.clock.device).eval()
    with torch.no_grad():
        adapter.readout_out.weight.normal_(std=0.1)
    utterances = torch.randn(3, 2, world.scale.audio_tokens, 64, device=world.clock.device)

    def dialogue() -> list[Tensor]:
        state = adapter.initial_state(batch_size=2)
        for utterance in utterances:
            state = adapter.write(state, utterance)
        return [*state.weights, *state.momentum, adapter.read(state, utterances[0])]

    def gradients() -> list[Tensor]:
        loss = dialogue()[-1].square().mean()
        found = torch.autograd.grad(loss, list(adapter.parameters()), allow_unused=True)
        return [g for g in found if g is not None]

    # Gradients go through three utterances, whose own errors of 2e-6 add up.
    for name, run, target in (("", torch.no_grad()(dialogue), 1e-5), (", gradients", gradients, 1e-4)):
        found = run()
        with in_pytorch():
            plain = run()
        same = all(map(torch.equal, found, plain))
        note = "the same bits: no fused kernel ran" if same else ""
        label = f"adapter{name}, default − {SWITCH}=0"
        size = f"3 utterances, B2 T{world.scale.audio_tokens}"
        yield Figure(label, size, worst(found, plain), "", "", target, note=note)
