"""Gradient checkpointing that runs a layer's hooks inside, and again in backward: transformers before 5.21, and models
whose own loop checkpoints `layer.__call__`. The memory is read and written outside, once."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

__all__ = ["OutsideCheckpoint", "step_inside", "step_outside"]

_ATTRIBUTE = "_gradient_checkpointing_func"  # where transformers keeps the function on each checkpointing module


class LayerHooks(Protocol):
    """The part of a memory's hooks that checkpointing concerns."""

    def around(self, layer: nn.Module, run: Callable[[], Any]) -> Any:
        """What `run` returns with the memory's residual added; hooks inside `run` keep still."""


class OutsideCheckpoint:
    """Stands in for a module's checkpointing function, and adds the memory of `layer` to what that returns.

    Args:
        checkpoint: The function in place, `checkpoint(function, *args)`.
        layer: The hooked layer; calls of others pass through.
        hooks: The memory's hooks.
    """

    def __init__(self, checkpoint: Callable[..., Any], layer: nn.Module, hooks: LayerHooks) -> None:
        self.checkpoint = checkpoint
        self.layer = layer
        self.hooks = hooks

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(self.checkpoint, function, *args, **kwargs)
        return self.hooks.around(self.layer, run) if self._runs_hooks(function) else run()

    def _runs_hooks(self, function: Callable[..., Any]) -> bool:
        """Whether `function` is the layer's `__call__`; its `forward` is checkpointed inside of its hooks."""
        while isinstance(function, functools.partial):
            function = function.func
        return getattr(function, "__self__", None) is self.layer and getattr(function, "__name__", "") != "forward"


def step_outside(module: nn.Module, layer: nn.Module, hooks: LayerHooks) -> None:
    """Wrap `module`'s checkpointing function, if it has one that is not wrapped for these hooks already."""
    checkpoint = vars(module).get(_ATTRIBUTE)  # a wrapper such as torch's would pass its module's on
    if checkpoint is not None and not any(w.hooks is hooks for w in _wrappers(checkpoint)):
        setattr(module, _ATTRIBUTE, OutsideCheckpoint(checkpoint, layer, hooks))


def step_inside(module: nn.Module, hooks: LayerHooks) -> None:
    """Undo `step_outside`, also where another memory has wrapped since."""
    outermost = vars(module).get(_ATTRIBUTE)
    for outer, inner in itertools.pairwise(_wrappers(outermost)):
        if inner.hooks is hooks:
            outer.checkpoint = inner.checkpoint
    if isinstance(outermost, OutsideCheckpoint) and outermost.hooks is hooks:
        setattr(module, _ATTRIBUTE, outermost.checkpoint)


def _wrappers(checkpoint: Any) -> list[OutsideCheckpoint]:
    """The wrappers around a checkpointing function, the outermost first."""
    found = []
    while isinstance(checkpoint, OutsideCheckpoint):
        found.append(checkpoint)
        checkpoint = checkpoint.checkpoint
    return found
