"""Ratios of times: both sides interleaved in one process, on one thread, in process CPU time (CUDA: events)."""

import os
import statistics
import time
from collections.abc import Callable

import torch

__all__ = ["Spread", "interleaved", "kernels", "peak_bytes", "settle"]


class Spread(tuple[float, float, float]):
    """Median and quartiles of times in milliseconds."""

    @property
    def median(self) -> float:
        return self[1]


def settle() -> None:
    """Use one thread, and an allocator that keeps freed memory, as in a process in which a host has run. glibc returns
    large blocks to the system until one of nearly 32 MiB was freed; without this, page faults would be measured."""
    torch.set_num_threads(1)
    block = torch.ones((32 << 20) // 4 - 4096)
    del block


def interleaved(
    *actions: Callable[[], object], seconds: float, device: str = "cpu", least: int = 5, warm: bool = False
) -> list[Spread]:
    """Times of each action, called in turn for `seconds` in all and at least `least` times; before, each is called
    once, unless it is `warm`."""
    times: list[list[float]] = [[] for _ in actions]
    for action in () if warm else actions:
        action()
    began = time.perf_counter()
    while len(times[0]) < least or time.perf_counter() - began < seconds:
        for action, own in zip(actions, times, strict=True):
            own.append(_milliseconds(action, device))
    return [Spread(statistics.quantiles(own, n=4)) for own in times]


def _milliseconds(action: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        action()
        return 1000 * (time.process_time() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    action()
    last.record()
    torch.cuda.synchronize()
    elapsed: float = first.elapsed_time(last)
    return elapsed


def peak_bytes(action: Callable[[], object]) -> int:
    """How much the process's memory grows during `action`; Linux only."""

    def now(field: str) -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith(field))

    with open(f"/proc/{os.getpid()}/clear_refs", "w") as reset:
        reset.write("5")
    before = now("VmRSS")
    action()
    return now("VmHWM") - before


_NO_KERNEL = {"aten._unsafe_view", "aten.scalar_tensor", "aten.promote_types"}  # in effect views, or no tensors


class kernels(torch.utils._python_dispatch.TorchDispatchMode):  # noqa: N801
    """Counts tensor operations that compute or copy, each a launch on a GPU; views are not counted.

    Example:
        >>> with kernels() as count:
        ...     _ = torch.ones(2, 3).mT.unsqueeze(0) + 1
        >>> count.names
        ['aten.ones', 'aten.add']
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        schema = func._schema
        is_view = not schema.is_mutable and any(returned.alias_info is not None for returned in schema.returns)
        name = str(func.overloadpacket)
        if not is_view and name not in _NO_KERNEL:
            self.names.append(name)
        return func(*args, **(kwargs or {}))
