"""One read and one write of the adapter: Python calls, launches, the device's time, CUDA graphs."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mal_adapter import MemoryAdapter, MemoryState
from mal_adapter.memory.spans import Spans
from tests.benchmarks.gpu.figures import Figure
from tests.benchmarks.gpu.host_rows import forward_launches
from tests.benchmarks.gpu.world import Budget, World

__all__ = ["adapter", "launches"]


@torch.no_grad()  # as in generate()
def adapter(world: World, budget: Budget) -> Iterator[Figure]:
    """Python calls, and CUDA graphs, which are the device's time alone."""
    ours, clock = world.memory.adapter, world.clock
    for batch in world.scale.prefill:
        size, state, hidden = _utterance(world, batch)
        if batch == 1:
            for name, run, before in (
                ("read", lambda s=state, h=hidden: ours.read(s, h), "0.75 ms"),
                ("write", lambda s=state, h=hidden: ours.write(s, h), "3.1 ms"),
            ):
                value = clock.call(run, seconds=world.seconds(0.5, budget))
                yield Figure(f"adapter.{name}, Python call", size, value, before=before)
        if clock.cuda:
            # A graph can't contain the copy of the rows' places from the host, so all calls share those.
            tokens = _Tokens(ours, state, hidden, Spans([hidden.shape[1]] * batch, clock.device))
            for name, run, before, target in (
                ("read", tokens.read, "0.21 ms", None),
                ("write", tokens.write, "0.58 ms", None),
                ("both", tokens.both, "", 0.25),
            ):
                budget.check(f"CUDA graph of a {name}, {size}")
                value, note = clock.graph_or_reason(run)
                before, target = (before, target) if batch == 1 else ("", None)
                yield Figure(f"{_NAMES[name]} as a CUDA graph", size, value, "ms", before, target, note=note)


@torch.no_grad()
def launches(world: World, budget: Budget) -> Iterator[Figure]:
    """What a read and a write make the device do, alone and in a forward of the host."""
    clock = world.clock
    size, state, hidden = _utterance(world, 1)
    tokens = _Tokens(world.memory.adapter, state, hidden)
    single = [clock.profile(run) for run in (tokens.read, tokens.write)]
    found = clock.profile(tokens.both)
    numbers = {"read": single[0]._asdict(), "write": single[1]._asdict(), "both": found._asdict()}
    note = f"read {single[0].launches}, write {single[1].launches}; both with an addition and the rows' places"
    target = None
    if clock.cuda:
        target = 30
    else:
        note += "; tensor operations"
    name = "launches of a read and a write together"
    yield Figure(name, size, found.launches, "", "229", target, note=note, numbers=numbers)
    if found.busy_ms is not None:
        note = " and ".join(f"{part.busy_ms:.3g}" for part in single)
        yield Figure("GPU busy, read and write together", size, found.busy_ms, "ms", "0.71 ms", 0.25, note=note)
    budget.check("launches of a forward")
    yield from forward_launches(world)


def _utterance(world: World, batch: int) -> tuple[str, MemoryState, Tensor]:
    """An utterance per row, in the host's dtype, and the state that another one left."""
    scale, ours = world.scale, world.memory.adapter
    shape = (batch, scale.audio_tokens, scale.text["hidden_size"])
    before, hidden = (torch.randn(shape, device=world.clock.device).to(scale.dtype) for _ in range(2))
    return f"batch {batch}, T{scale.audio_tokens}", ours.write(ours.initial_state(batch), before), hidden


_NAMES = {"read": "read", "write": "write", "both": "read and write together"}


class _Tokens:
    """Reads and writes of rows in one flat list, as a forward of the host makes them.

    Args:
        adapter: Reads and writes.
        state: One row per row of `hidden`.
        hidden: (batch, seq_len, hidden_size).
        spans: Where the rows are; each call makes its own unless given.
    """

    def __init__(self, adapter: MemoryAdapter, state: MemoryState, hidden: Tensor, spans: Spans | None = None) -> None:
        self._adapter, self._state, self._spans = adapter, state, spans
        self._lengths, self._tokens = [hidden.shape[1]] * len(hidden), hidden.flatten(0, 1)

    def _rows(self) -> Spans:
        return Spans(self._lengths, self._tokens.device) if self._spans is None else self._spans

    def read(self) -> Tensor:
        """The residual of each token."""
        return self._adapter.read_tokens(self._state, self._tokens, self._rows())

    def write(self) -> MemoryState:
        """The state afterwards."""
        return self._adapter.write_tokens(self._state, self._tokens, self._rows())

    def both(self) -> MemoryState:
        """A read, and a write of what the memory made of it."""
        spans = self._rows()
        understood = self._tokens + self._adapter.read_tokens(self._state, self._tokens, spans)
        return self._adapter.write_tokens(self._state, understood, spans)
