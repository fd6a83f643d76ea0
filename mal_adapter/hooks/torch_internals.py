"""The private names of torch that the hooks need, with the versions that have them. All were read in torch 2.4 to 2.13.

`Module._forward_hooks`, `_forward_pre_hooks` and the dictionaries of their options (all since 2.0) are the only way to
see whose hooks a module has, and to remove those that were copied. `torch._C._current_graph_task_id` (since 1.12) tells
a backward from a forward. `torch._C._autograd._top_saved_tensors_default_hooks` (since 2.8) tells a checkpoint that is
not reentrant; without it such a checkpoint is not noticed. `torch._dynamo.eval_frame.skip_code` (since 2.0) keeps
torch.compile from making a graph of a function that is called outside of all graphs.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch._dynamo.eval_frame import skip_code

__all__ = ["drop_hooks_of", "hook_owners", "inside_checkpoint", "no_graph_of_its_own", "runs_backward"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_OPTIONS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def runs_backward() -> bool:
    """Whether a backward runs this forward again, for a checkpoint."""
    return torch._C._current_graph_task_id() != -1


def inside_checkpoint() -> bool:
    """Whether a torch.utils.checkpoint that is not reentrant records the current forward, known by the hook it packs
    saved tensors with."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks = None if top is None else top(True)
    return hooks is not None and "checkpoint" in getattr(hooks[0], "__qualname__", "")


def no_graph_of_its_own(function: _Function) -> _Function:
    """Let torch.compile trace `function` where it is called in what is traced, and run it as it is elsewhere: the hooks
    of the compiled module itself are called outside of its graph."""
    skip_code(function.__code__)
    return function


def hook_owners(module: nn.Module) -> Iterator[object]:
    """The objects whose methods are hooks of `module`, one per hook."""
    for name in _HOOKS:
        for hook in tuple(getattr(module, name).values()):
            yield getattr(hook, "__self__", None)


def drop_hooks_of(module: nn.Module, owner: object) -> None:
    """Remove the hooks of `module` that are methods of `owner`, without the handles that removed them."""
    for name in _HOOKS:
        hooks: dict[int, Any] = getattr(module, name)
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is owner]:
            # Options are kept by the hook's number, which the next hook of another process has again.
            for numbered in (hooks, *(getattr(module, option) for option in _OPTIONS)):
                numbered.pop(key, None)
