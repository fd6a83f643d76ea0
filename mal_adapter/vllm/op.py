"""The custom op at the hooked layer. torch.compile keeps it whole, and vLLM runs it between two compiled parts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["OPS", "add_memory", "running"]

OPS = ("mal_adapter::add_memory", "mal_adapter::add_memory_one")
"""Their names, for vLLM's `splitting_ops`."""


class _Memory(Protocol):
    def change(self, hidden: Tensor, residual: Tensor | None) -> None: ...


_running: _Memory | None = None  # of the step that this process runs now; an engine runs one at a time


@contextmanager
def running(memory: _Memory) -> Iterator[None]:
    """Within this block, forwards of this process read and write `memory`. Outside, the op does nothing, as in vLLM's
    profile and warm-up runs."""
    global _running
    before, _running = _running, memory
    try:
        yield
    finally:
        _running = before


@torch.library.custom_op(OPS[0], mutates_args=("hidden",))
def _add_memory(hidden: Tensor, residual: Tensor) -> None:
    if _running is not None:
        _running.change(hidden, residual)


@torch.library.custom_op(OPS[1], mutates_args=("hidden",))
def _add_memory_one(hidden: Tensor) -> None:
    if _running is not None:
        _running.change(hidden, None)


@_add_memory.register_fake
def _(hidden: Tensor, residual: Tensor) -> None:
    pass


@_add_memory_one.register_fake
def _(hidden: Tensor) -> None:
    pass


def add_memory(module: object, args: object, output: Any) -> Any:
    """A forward hook: add the memory's residual to a decoder layer's output, in place.

    vLLM's layers return (hidden, residual), whose sum is the residual stream; the next layer's norm adds them up.
    """
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Tensor):
        _add_memory(output[0], output[1])
    else:
        _add_memory_one(output[0] if isinstance(output, tuple) else output)
    return output
