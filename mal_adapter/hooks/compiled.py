"""The hooks in what `torch.compile` traces: each is one operation, and the graph around it stays whole.

At run time an operation calls the hook itself, as outside of a compiled graph. So a graph knows neither session nor
mode nor the number of audio tokens, and serves all of them. The operations stay in order, and none is left out, because
each says that it changes one small tensor.

Where gradients are recorded the hooks are graph breaks instead: autograd can't look into an operation. So are they
where audio is at every position: the KV cache, which is no tensor, says there which utterance continues.
"""

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from mal_adapter.hosts.spec import HostSpec

__all__ = ["TracedHooks"]


class Hooks(Protocol):
    """The hooks of one memory, which its operations call."""

    modules: tuple[nn.Module, ...]
    prompt_module: nn.Module

    @property
    def session(self) -> object | None:
        """The session that the running code is in."""

    def run_begin(self, module: nn.Module) -> None:
        """A forward of a hooked module starts."""

    def run_prompt(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The module that receives ids and audio features is called with these arguments."""

    def run_layer(self, output: Any) -> Any:
        """The hooked layer returned `output`; returns it with the memory's residual, or None."""

    def run_end(self, module: nn.Module, succeeded: bool) -> None:
        """A forward of a hooked module ended."""

    def abandon(self) -> None:
        """The running forward fails in an operation. A graph calls no hooks after that."""


_MEMORIES: WeakValueDictionary[int, Hooks] = WeakValueDictionary()
_NUMBERS = itertools.count()
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # since torch 2.7


class TracedHooks:
    """What a graph has of one memory's hooks; `torch.compile` traces its methods.

    Without `register`, as in a copied host, the operations do nothing.

    Args:
        host: The host's description.
    """

    def __init__(self, host: HostSpec) -> None:
        self._memory = next(_NUMBERS)
        self._modules: tuple[nn.Module, ...] = ()
        self._parameters: tuple[str, ...] = ()
        self._names = ("input_ids", "inputs_embeds", *(host.feature_arguments or ()))
        self._takes_all = host.find_mask is not None or host.clip_tokens is not None
        self._takes_cache = host.audio_positions == "every"
        with torch.inference_mode(False):  # what was made there could not be changed outside
            self._order = torch.zeros(1)

    def register(self, hooks: Hooks) -> None:
        """The operations call these hooks from now on, without keeping them alive."""
        self._modules = hooks.modules
        self._parameters = tuple(inspect.signature(hooks.prompt_module.forward).parameters)
        _MEMORIES[self._memory] = hooks

    def close(self) -> None:
        """The hooks are removed: their operations in graphs that were traced before do nothing from now on."""
        _MEMORIES.pop(self._memory, None)

    def active(self) -> bool:
        """Whether the hooks are operations in what is traced now, and no graph breaks."""
        # An exported program runs elsewhere, where there is no memory.
        return not torch.is_grad_enabled() and not self._takes_cache and not _is_exporting()

    def begin(self, module: nn.Module) -> None:
        """A forward of `module` starts."""
        torch.ops.mal_adapter.hook_begin(self._order, self._memory, self._number(module))

    def prompt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """The prompt module is called with these arguments; returns whether an operation can take them."""
        names: list[str] = []
        tensors: list[Tensor] = []
        if len(args) > len(self._parameters):
            return not self._modules
        for name, value in (*zip(self._parameters, args, strict=False), *kwargs.items()):
            if not self._takes_all and name not in self._names:
                continue
            if isinstance(value, Tensor):
                names.append(name)
                tensors.append(value)
            elif isinstance(value, list | tuple):
                for item in value:
                    if not isinstance(item, Tensor):
                        return False
                    names.append(name + "*")
                    tensors.append(item)
        torch.ops.mal_adapter.hook_prompt(self._order, self._memory, " ".join(names), tensors)
        return True

    def layer(self, output: Any) -> Any:
        """The hooked layer returned `output`; returns it with the memory's residual."""
        first = output[0] if isinstance(output, tuple) else output
        changed = torch.ops.mal_adapter.hook_layer(self._order, self._memory, first)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def end(self, module: nn.Module) -> None:
        """A forward of `module` ended."""
        torch.ops.mal_adapter.hook_end(self._order, self._memory, self._number(module))

    def _number(self, module: nn.Module) -> int:
        for number, hooked in enumerate(self._modules):
            if module is hooked:
                return number
        return -1


@contextmanager
def _abandoning(hooks: Hooks) -> Iterator[None]:
    """If an operation raises, the forward is over."""
    try:
        yield
    except BaseException:
        hooks.abandon()
        raise


# Where torch splits a graph into CUDA graphs, an operation with this tag stays between them: replaying one calls no
# Python. Since torch 2.9.
_UNSAFE: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


@torch.library.custom_op("mal_adapter::hook_begin", mutates_args=("order",), **_UNSAFE)
def _begin(order: Tensor, memory: int, module: int) -> None:
    if (hooks := _MEMORIES.get(memory)) is not None:
        with _abandoning(hooks):
            hooks.run_begin(hooks.modules[module])


@torch.library.custom_op("mal_adapter::hook_prompt", mutates_args=("order",), **_UNSAFE)
def _prompt(order: Tensor, memory: int, names: str, tensors: list[Tensor]) -> None:
    if (hooks := _MEMORIES.get(memory)) is None:
        return
    call: dict[str, Any] = {}
    for name, tensor in zip(names.split(), tensors, strict=True):
        # The session compares later prompts with this one, and a compiled graph uses the memory of its tensors again.
        kept = tensor if hooks.session is None else tensor.clone()
        if name.endswith("*"):
            call.setdefault(name.removesuffix("*"), []).append(kept)
        else:
            call[name] = kept
    with _abandoning(hooks):
        hooks.run_prompt(hooks.prompt_module, (), call)


@torch.library.custom_op("mal_adapter::hook_layer", mutates_args=("order",), **_UNSAFE)
def _layer(order: Tensor, memory: int, hidden: Tensor) -> Tensor:
    changed = None
    if (hooks := _MEMORIES.get(memory)) is not None:
        with _abandoning(hooks):
            changed = hooks.run_layer(hidden)
    if changed is None:  # an operation may not return its argument
        return hidden.clone(memory_format=torch.contiguous_format)
    contiguous: Tensor = changed.contiguous()
    return contiguous


@torch.library.custom_op("mal_adapter::hook_end", mutates_args=("order",), **_UNSAFE)
def _end(order: Tensor, memory: int, module: int) -> None:
    if (hooks := _MEMORIES.get(memory)) is not None:
        with _abandoning(hooks):
            hooks.run_end(hooks.modules[module], succeeded=True)


for _operation in (_begin, _prompt, _end):
    _operation.register_fake(lambda *_: None)


@_layer.register_fake
def _(order: Tensor, memory: int, hidden: Tensor) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)
