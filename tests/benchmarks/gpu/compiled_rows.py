"""The memory in a compiled host and on a static cache: on a small Qwen2-Audio, since these are yes or no."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mal_adapter import attach_memory
from tests.benchmarks.gpu.figures import Figure
from tests.benchmarks.gpu.world import Budget, World, answers_something
from tests.benchmarks.gpu.writes import worst
from tests.hosts.builders import HOSTS

__all__ = ["compiled"]


class Graphs:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


@torch.no_grad()
def compiled(world: World, budget: Budget) -> Iterator[Figure]:
    """Graph breaks of a forward in a session; the answers of a full graph, and of generate() on a static cache."""
    family = HOSTS["qwen2_audio"]
    model = family.build(num_layers=2).to(world.clock.device)
    inputs = {name: t.to(world.clock.device) for name, t in family.make_inputs(model, [[12], [9]])[0].items()}
    memory = attach_memory(model, 0)
    answers_something(memory)
    ids = ["a", "b"]

    def dialogue(run: Callable[[], Tensor]) -> list[Tensor]:
        """The second utterance's answer, and the state after it."""
        for i in ids:
            memory.states.pop(i, None)
        with memory.session(ids):
            run()
            answer = run()
        return [answer, *memory.states["a"].weights, *memory.states["b"].weights]

    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "disable_compile": True}
    options |= {"return_dict_in_generate": True, "output_logits": True}

    def generate(**more: Any) -> Tensor:
        return torch.stack(model.generate(**inputs, **options, **more).logits)

    dynamic, static = (dialogue(lambda m=m: generate(**m)) for m in ({}, {"cache_implementation": "static"}))
    error = worst(static, dynamic)
    yield Figure("static cache − dynamic cache, answers and states", "tiny Qwen2-Audio", error, "", "", 1e-4)

    eager = dialogue(lambda: model(**inputs).logits)
    budget.check("graph breaks")
    bare = _graphs(family.build(num_layers=2).to(world.clock.device), inputs)
    with memory.session(ids):
        breaks: float = _graphs(model, inputs) - bare
    torch.compiler.reset()
    try:
        full = torch.compile(model, fullgraph=True, backend="aot_eager")
        note = f"fullgraph=True differs by {worst(dialogue(lambda: full(**inputs).logits), eager):.1e}"
    except Exception as reason:
        first_line = str(reason).splitlines()[0]
        breaks, note = breaks or math.nan, f"fullgraph=True raises {type(reason).__name__}: {first_line}"
    torch.compiler.reset()
    yield Figure("graph breaks of a forward in a session", "tiny Qwen2-Audio", breaks, "", "breaks", 0, note=note)


def _graphs(model: Callable[..., Any], inputs: dict[str, Tensor]) -> int:
    """How many graphs torch.compile makes of a forward."""
    torch.compiler.reset()
    graphs = Graphs()
    torch.compile(model, backend=graphs)(**inputs)
    torch.compiler.reset()
    return graphs.count
