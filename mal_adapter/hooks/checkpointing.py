"""Gradient checkpointing that runs a layer's hooks inside, and again in backward: transformers before 5.21, and models
whose own loop checkpoints `layer.__call__`. The memory is read and written outside, once."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

__all__ = ["CheckpointWrapper", "unwrap", "wrap"]

_ATTRIBUTE = "_gradient_checkpointing_func"  # where transformers keeps the function on each checkpointing module


class LayerHooks(Protocol):
    """The part of a memory's hooks that checkpointing concerns."""

    def run_outside(self, layer: nn.Module, run: Callable[[], Any]) -> Any:
        """Return what `run` returns, with the memory's residual added; hooks inside `run` do nothing."""


class CheckpointWrapper:
    """Replace a module's checkpointing function, and add the memory of `layer` to what that returns.

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
        return self.hooks.run_outside(self.layer, run) if self._runs_hooks(function) else run()

    def _runs_hooks(self, function: Callable[..., Any]) -> bool:
        """Whether `function` is the layer's `__call__`; its `forward` is checkpointed inside of its hooks."""
        while isinstance(function, functools.partial):
            function = function.func
        return getattr(function, "__self__", None) is self.layer and getattr(function, "__name__", "") != "forward"


def wrap(module: nn.Module, layer: nn.Module, hooks: LayerHooks) -> None:
    """Wrap `module`'s checkpointing function, if it has one that is not wrapped for these hooks already."""
    checkpoint = vars(module).get(_ATTRIBUTE)  # a wrapper such as torch's would pass its module's on
    if checkpoint is not None and not any(w.hooks is hooks for w in _wrappers(checkpoint)):
        setattr(module, _ATTRIBUTE, CheckpointWrapper(checkpoint, layer, hooks))


def unwrap(module: nn.Module, hooks: LayerHooks) -> None:
    """Undo `wrap`, also where another memory has wrapped since."""
    outermost = vars(module).get(_ATTRIBUTE)
    for outer, inner in itertools.pairwise(_wrappers(outermost)):
        if inner.hooks is hooks:
            outer.checkpoint = inner.checkpoint
    if isinstance(outermost, CheckpointWrapper) and outermost.hooks is hooks:
        setattr(module, _ATTRIBUTE, outermost.checkpoint)


def _wrappers(checkpoint: Any) -> list[CheckpointWrapper]:
    """The wrappers around a checkpointing function, the outermost first."""
    found = []
    while isinstance(checkpoint, CheckpointWrapper):
        found.append(checkpoint)
        checkpoint = checkpoint.checkpoint
    return found
