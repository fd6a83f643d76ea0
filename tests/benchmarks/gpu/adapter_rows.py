"""One read and one write of the adapter: Python calls, launches, the device's time, CUDA graphs."""

from collections.abc import Callable, Iterator

import torch

from tests.benchmarks.gpu.figures import Figure
from tests.benchmarks.gpu.world import Budget, World

__all__ = ["adapter"]

Run = Callable[[], object]


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

            def reads(state=state, hidden=hidden) -> object:  # type: ignore[no-untyped-def]
                return ours.read(state, hidden)

            def writes(state=state, hidden=hidden) -> object:  # type: ignore[no-untyped-def]
                return ours.write(state, hidden)

            def both(state=state, hidden=hidden) -> object:  # type: ignore[no-untyped-def]
                return ours.write(state, hidden + ours.read(state, hidden))

            if batch == 1:
                yield from _launches(world, budget, size, reads, writes, both)
            for name, run, before in (
                ("read", reads, "0.21 ms"), ("write", writes, "0.58 ms"), ("read and write together", both, "")
            ):  # fmt: skip
                if clock.cuda:
                    budget.check(f"CUDA graph, {name}, {size}")
                    value = clock.graph(run)
                    yield Figure(f"{name} as a CUDA graph", size, value, before=before if batch == 1 else "")


def _launches(world: World, budget: Budget, size: str, reads: Run, writes: Run, both: Run) -> Iterator[Figure]:
    clock = world.clock
    for name, run, before in (("read", reads, "0.75 ms"), ("write", writes, "3.1 ms")):
        value = clock.call(run, seconds=world.seconds(0.5, budget))
        yield Figure(f"adapter.{name}, Python call", size, value, before=before)
    single = [clock.profile(run) for run in (reads, writes)]
    found = clock.profile(both)
    numbers = {"read": single[0]._asdict(), "write": single[1]._asdict(), "both": found._asdict()}
    parts = f"read {single[0].launches}, write {single[1].launches}, and an addition"
    note = parts if clock.cuda else f"{parts}; tensor operations of the path in PyTorch"
    target = 30 if clock.cuda else None
    name = "launches of a read and a write together"
    yield Figure(name, size, found.launches, "", "229", target, note=note, numbers=numbers)
    if found.busy_ms is not None:
        note = " + ".join(f"{part.busy_ms:.3g}" for part in single)
        yield Figure("GPU busy, read and write together", size, found.busy_ms, "ms", "0.71 ms", 0.25, note=note)
