"""One read and one write of the adapter: Python calls, launches, the device's time, CUDA graphs."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mal_adapter import MemoryAdapter, MemoryState
from mal_adapter.memory.spans import Spans
from tests.benchmarks.gpu.figures import Figure
from tests.benchmarks.gpu.world import Budget, World

__all__ = ["adapter"]


def adapter(world: World, budget: Budget) -> Iterator[Figure]:
    """Of one utterance per row, with hidden states of the host's dtype."""
    clock, scale = world.clock, world.scale
    ours = world.memory.adapter
    for batch in scale.prefill:
        budget.check(f"batch {batch}")
        hidden = torch.randn(batch, scale.audio_tokens, scale.text["hidden_size"]).to(clock.device, scale.dtype)
        size = f"batch {batch}, T{scale.audio_tokens}"
        with torch.no_grad():  # as in generate()
            state = ours.write(ours.initial_state(batch), hidden)
            if batch == 1:
                yield from _calls(world, budget, size, state, hidden)
                yield from _launches(world, size, _Tokens(ours, state, hidden))
            for name, before in (("read", "0.21 ms"), ("write", "0.58 ms"), ("both", "")) if clock.cuda else ():
                budget.check(f"CUDA graph, {name}, {size}")
                # The spans are kept: a graph can't contain their copy from the host.
                value = clock.graph(
                    getattr(_Tokens(ours, state, hidden, Spans([scale.audio_tokens] * batch, clock.device)), name)
                )
                yield Figure(f"{_NAMES[name]} as a CUDA graph", size, value, before=before if batch == 1 else "")


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


def _calls(world: World, budget: Budget, size: str, state: MemoryState, hidden: Tensor) -> Iterator[Figure]:
    ours = world.memory.adapter
    runs: tuple[tuple[str, Callable[[], object], str], ...] = (
        ("read", lambda: ours.read(state, hidden), "0.75 ms"),
        ("write", lambda: ours.write(state, hidden), "3.1 ms"),
    )
    for name, run, before in runs:
        value = world.clock.call(run, seconds=world.seconds(0.5, budget))
        yield Figure(f"adapter.{name}, Python call", size, value, before=before)


def _launches(world: World, size: str, tokens: _Tokens) -> Iterator[Figure]:
    clock = world.clock
    single = [clock.profile(run) for run in (tokens.read, tokens.write)]
    found = clock.profile(tokens.both)
    numbers = {"read": single[0]._asdict(), "write": single[1]._asdict(), "both": found._asdict()}
    parts = f"read {single[0].launches}, write {single[1].launches}; both with an addition and the rows' places"
    note = parts if clock.cuda else f"{parts}; tensor operations, in PyTorch"
    name = "launches of a read and a write together"
    yield Figure(name, size, found.launches, "", "229", 30, note=note, numbers=numbers)
    if found.busy_ms is not None:
        note = " and ".join(f"{part.busy_ms:.3g}" for part in single)
        yield Figure("GPU busy, read and write together", size, found.busy_ms, "ms", "0.71 ms", 0.25, note=note)
