"""The memory as a whole module, beside titans-pytorch's fastest mode."""

import importlib.util
import math
from collections.abc import Callable, Iterator
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mal_adapter.memory.gates import Gates
from mal_adapter.memory.spans import Spans
from tests.benchmarks.gpu.figures import Figure, share, short
from tests.benchmarks.gpu.library import CHUNK, Problem, kernels_for, read, write
from tests.benchmarks.gpu.world import Budget, Size, World
from tests.benchmarks.gpu.writes import in_pytorch
from tests.benchmarks.modules import forward, forward_backward, titans_pytorch

__all__ = ["OurModule", "against_titans_pytorch"]

_MODES: dict[str, tuple[Callable[[nn.Module, Tensor], Callable[[], object]], float, str]] = {
    "forward": (forward, 5, "0.57–2.9 times"),
    "with backward": (forward_backward, 3, "0.31–1.65 times"),
}


class OurModule(nn.Module):
    """Norm, projections, a read and a write, with gates per token: the work that titans-pytorch's module does."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        heads, d = size.heads, size.d
        width = heads * d
        self.norm = nn.RMSNorm(width)
        self.proj = nn.Linear(width, 3 * width + 3 * heads)
        with torch.no_grad():
            self.proj.bias[-3 * heads :] = torch.tensor([-4.0, 0.0, -8.0]).repeat_interleave(heads)
        shapes = [(d, d)] if size.depth == 1 else [(d, 2 * d), (2 * d, d)]
        self.initial = nn.ParameterList(torch.randn(heads, *s) / math.sqrt(s[0]) for s in shapes)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        heads, d = self.size.heads, self.size.d
        q, k, v, g = self.proj(self.norm(x)).flatten(0, 1).split([heads * d] * 3 + [3 * heads], dim=-1)
        q, k, v = (t.unflatten(-1, (heads, d)) for t in (q, k, v))
        zeros = tuple(w.new_zeros(len(x), *w.shape) for w in self.initial)
        gates = Gates(*g.unflatten(-1, (3, heads)).unbind(1))
        spans = Spans([x.shape[1]] * len(x), x.device)
        queries, keys = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        given = Problem(tuple(self.initial), zeros, zeros, keys, v, queries, gates, spans, None)
        kernels = kernels_for(given)
        return read(given, kernels).flatten(1), write(given, kernels)


def against_titans_pytorch(world: World, budget: Budget) -> Iterator[Figure]:
    """The grid of whole modules, forward and with backward. Both sides are Python calls in float32."""
    clock = world.clock
    installed = importlib.util.find_spec("titans_pytorch") is not None
    worst: dict[str, list[tuple[float, Size]]] = {mode: [] for mode in _MODES}
    for size in world.scale.modules:
        x = torch.randn(size.batch, size.seq_len, size.heads * size.d, device=clock.device)
        ours = OurModule(size).to(clock.device)
        peer = titans_pytorch(size.d, CHUNK, size.heads).to(clock.device) if installed else None
        for mode, (run, target, before) in _MODES.items():
            budget.check(f"{size}, {mode}")
            actions = [run(ours, x)] + ([run(peer, x)] if peer is not None else [])
            mine, *theirs = clock.interleaved(*actions, seconds=world.seconds(0.15, budget))
            numbers = {"ours_ms": mine, "titans_pytorch_ms": theirs[0] if theirs else None}
            note = f"{short(median(mine))} ms"
            with in_pytorch():
                numbers["pytorch_ms"] = clock.call(run(ours, x), seconds=0)
            note += f", in PyTorch {short(numbers['pytorch_ms'])} ms"
            if theirs:
                ratio, note = share(theirs[0], mine), f"{note}; theirs {short(median(theirs[0]))} ms"
                worst[mode].append((ratio, size))
            else:
                ratio, target, note = math.nan, None, f"{note}; titans-pytorch is not installed"
            name = f"against titans-pytorch's fastest, {mode}"
            yield Figure(name, str(size), ratio, "times", before, target, "≥", note, numbers)
    for mode, found in worst.items():
        if found:
            ratio, size = min(found, key=lambda pair: pair[0])
            name = f"the least of these {len(found)}, {mode}"
            yield Figure(name, str(size), ratio, "times", _MODES[mode][2], _MODES[mode][1], "≥")
