"""What the library takes from inside torch is in one file, and does what it says in the torch at hand."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mal_adapter
from mal_adapter.hooks.torch_internals import (
    drop_hooks_of,
    hook_owners,
    inside_checkpoint,
    no_graph_of_its_own,
    runs_backward,
)

PACKAGE = Path(mal_adapter.__file__).parent


def private(source: str) -> Iterator[str]:
    """Names of torch with an underscore, and the dictionaries of a module's hooks."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if re.match(r"torch\._[^_]", name) or re.match(r"_forward_(pre_)?hooks", node.attr):
                yield name
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch._"):
            yield str(node.module)


def test_private_names_of_torch_are_in_one_file():
    found = {
        path.relative_to(PACKAGE).as_posix(): names
        for path in PACKAGE.rglob("*.py")
        if (names := set(private(path.read_text())))
    }
    assert found.pop("hooks/torch_internals.py") > {"torch._C._autograd", "torch._dynamo.eval_frame"}
    assert found == {}


class Owner:
    """The owner of some hooks."""

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None: ...

    def after(self, module: nn.Module, args: Any, output: Any) -> None: ...


def test_hooks_are_removed_by_owner_with_their_options_and_others_stay():
    module, mine, other = nn.Linear(2, 2), Owner(), Owner()
    bare = {name: dict(value) for name, value in vars(module).items() if "hook" in name and isinstance(value, dict)}
    for owner in (mine, other):
        module.register_forward_pre_hook(owner.before, with_kwargs=True)
        module.register_forward_hook(owner.after, always_call=True)
    assert list(hook_owners(module)) == [mine, other, mine, other]
    drop_hooks_of(module, mine)
    assert list(hook_owners(module)) == [other, other]
    drop_hooks_of(module, other)
    assert {name: dict(vars(module)[name]) for name in bare} == bare


def test_a_checkpoint_is_known_while_it_records_and_while_backward_runs_it_again():
    seen = []

    def run(x: Tensor) -> Tensor:
        seen.append((inside_checkpoint(), runs_backward()))
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    run(x).sum().backward()
    checkpoint(run, x, use_reentrant=False).sum().backward()
    checkpoint(run, x, use_reentrant=True).sum().backward()
    inside = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    assert seen[0] == (False, False)
    assert seen[1] == (inside, False)
    assert [backward for _, backward in seen[2:]] == [True, False, True]


def test_a_function_has_no_graph_of_its_own_and_is_traced_inside_of_others():
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    @no_graph_of_its_own
    def double(x: Tensor) -> Tensor:
        return 2 * x

    torch.compiler.reset()
    assert torch.compile(double, backend=backend)(torch.ones(1)) == 2
    assert graphs == []
    assert torch.compile(lambda x: double(x) + 1, backend=backend, fullgraph=True)(torch.ones(1)) == 3
    (graph,) = graphs
    assert "2 *" in graph.code
