"""Time, launches and waits: by CUDA's events, graphs, profiler and debug mode; and the CPU's counterpart. All that
needs a GPU is here."""

import contextlib
import math
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from statistics import median
from typing import NamedTuple

import torch

from tests.benchmarks.timing import kernels

__all__ = ["Clock", "CpuClock", "CudaClock", "NeedsGPUError", "Profile", "clock_of", "noted_waits", "within_library"]

Action = Callable[[], object]
Around = Callable[[], AbstractContextManager[object]]


class NeedsGPUError(RuntimeError):
    """Only a GPU has this."""


class Profile(NamedTuple):
    """What one call made the device do."""

    launches: int
    """kernels, copies and fills; on the CPU tensor operations that compute or copy"""
    busy_ms: float | None
    """the device's time in them; None on the CPU"""
    stream_waits: int | None
    """calls of cudaStreamSynchronize; None on the CPU"""


class Clock(ABC):
    """Measures on one device.

    Attributes:
        device: The device.
        cuda: Whether it is a GPU.
    """

    device: torch.device
    cuda: bool

    @abstractmethod
    def milliseconds(self, action: Action) -> float:
        """One call's time."""

    @abstractmethod
    def graph(self, action: Action) -> float:
        """The time in ms of a CUDA graph's replay, or NeedsGPUError."""

    @abstractmethod
    def profile(self, action: Action) -> Profile:
        """What one call of `action` makes the device do. Time nothing afterwards: CUDA's profiler slows launches."""

    @abstractmethod
    def seen_waits(self) -> AbstractContextManager[list[str] | None]:
        """The places in this library that wait for the device within the block, by the device's own account; None on
        the CPU, which has none."""

    @abstractmethod
    def free(self) -> None:
        """Give back memory that nothing uses."""

    def interleaved(
        self, *actions: Action, seconds: float, least: int = 5, around: Sequence[Around] | None = None
    ) -> list[list[float]]:
        """Times in ms of each action, called in turn for `seconds` in all and at least `least` times; each round begins
        with another one. `around` has a context per action, which is entered and left outside of the time."""
        contexts = around or [contextlib.nullcontext] * len(actions)
        for _ in range(2):  # the first call compiles and chooses algorithms, the second finds all of that
            for action, context in zip(actions, contexts, strict=True):
                with context():
                    action()
        times: list[list[float]] = [[] for _ in actions]
        began, rounds = time.perf_counter(), 0
        while rounds < least or time.perf_counter() - began < seconds:
            for place in range(len(actions)):
                index = (place + rounds) % len(actions)
                with contexts[index]():
                    times[index].append(self.milliseconds(actions[index]))
            rounds += 1
        return times

    def graph_or_reason(self, action: Action) -> tuple[float, str]:
        """The time of a CUDA graph's replay; or NaN, and why there is no such graph."""
        try:
            return self.graph(action), ""
        except RuntimeError as error:  # what can't be recorded raises when it is called
            return math.nan, f"no CUDA graph: {str(error).splitlines()[0]}"

    def call(self, action: Action, *, seconds: float = 0.2) -> float:
        """The median time in ms of a Python call."""
        return median(self.interleaved(action, seconds=seconds, least=3)[0])


class CpuClock(Clock):
    """The host's clock; what only a GPU has raises NeedsGPUError."""

    device = torch.device("cpu")
    cuda = False

    def milliseconds(self, action: Action) -> float:
        began = time.perf_counter()
        action()
        return 1000 * (time.perf_counter() - began)

    def graph(self, action: Action) -> float:
        raise NeedsGPUError("a CUDA graph needs a GPU")

    def profile(self, action: Action) -> Profile:
        with kernels() as count:
            action()
        return Profile(len(count.names), None, None)

    @contextmanager
    def seen_waits(self) -> Iterator[None]:
        yield None

    def free(self) -> None:
        pass


class CudaClock(Clock):
    """CUDA's events, graphs, profiler and debug mode."""

    device = torch.device("cuda", 0)
    cuda = True
    _profiled = False

    def milliseconds(self, action: Action) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        action()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last))

    def graph(self, action: Action, replays: int = 10) -> float:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries make their workspaces at the first calls, which can't be recorded
            for _ in range(3):
                action()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            action()

        def replay() -> None:
            for _ in range(replays):
                graph.replay()

        return self.call(replay) / replays

    def profile(self, action: Action) -> Profile:
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        action()
        # The very first block sets the profiler up, which takes seconds, and may lose events.
        for _ in range(1 if self._profiled else 2):
            self._profiled = True
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
                action()
                torch.cuda.synchronize()
        events = found.events()
        on_device = [
            e for e in events if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)
        ]
        work = [e for e in on_device if "Sync" not in e.name]
        busy_us = sum(e.time_range.elapsed_us() for e in work)
        waits = sum(e.name == "cudaStreamSynchronize" for e in events)
        return Profile(len(work), busy_us / 1000, waits)

    @contextmanager
    def seen_waits(self) -> Iterator[list[str]]:
        with noted_waits() as found:
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def free(self) -> None:
        torch.cuda.empty_cache()


@contextmanager
def noted_waits() -> Iterator[list[str]]:
    """The places in this library where torch warns, in its debug mode, of an operation that waits for the device."""
    found: list[str] = []

    def note(message: Warning | str, *_: object, **__: object) -> None:
        place = within_library()
        if place is not None and "synchronizing CUDA operation" in str(message):
            found.append(place)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield found


def clock_of(device: str) -> Clock:
    """The clock of "cpu" or "cuda"."""
    return CudaClock() if device == "cuda" else CpuClock()


def within_library() -> str | None:
    """The innermost place in this library that the running code was called from; None if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        if "/mal_adapter/" in (name := frame.f_code.co_filename.replace("\\", "/")) and "/tests/" not in name:
            return f"{name.rpartition('/mal_adapter/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return None
