"""Compiles the fused kernels for one memory of the grids into Triton's cache, in a process of its own.

python -m tests.benchmarks.gpu.warm 4 64 2          # heads, width, depth
"""

import subprocess
import sys
import time

from tests.benchmarks.gpu.clock import Clock, clock_of
from tests.benchmarks.gpu.library import kernels_for, problem, read, write
from tests.benchmarks.gpu.world import SCALES, Scale
from tests.benchmarks.gpu.writes import write_and_backward

__all__ = ["compile_all", "start", "wait"]


def start(scale: Scale, clock: Clock) -> list[subprocess.Popen[str]]:
    """A process per memory of the grids: kernels take seconds each to compile, on one core."""
    if not clock.cuda:
        return []
    memories = dict.fromkeys((s.heads, s.d, s.depth) for s in (*scale.writes, *scale.modules))
    name = next(name for name, known in SCALES.items() if known is scale)
    command = [sys.executable, "-m", "tests.benchmarks.gpu.warm", name]
    return [subprocess.Popen([*command, *map(str, memory)], text=True, stderr=subprocess.PIPE) for memory in memories]


def wait(processes: list[subprocess.Popen[str]], seconds: float) -> list[str]:
    """Wait for them, and end those that take longer; returns what went wrong."""
    end, wrong = time.monotonic() + seconds, []
    for process in processes:
        memory = "×".join(process.args[-3:])  # type: ignore[misc, index]
        try:
            _, errors = process.communicate(timeout=max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            wrong.append(f"{memory}: not compiled in {seconds:.0f} s")
            continue
        if process.returncode:
            wrong.append(f"{memory}: {(errors.strip().splitlines() or ['failed'])[-1]}")
    return wrong


def compile_all(scale: Scale, clock: Clock, memory: tuple[int, int, int]) -> int:
    """Run each kernel once for all sizes of one memory, with gradients and without; returns the number of sizes."""
    sizes = [s for s in (*scale.writes, *scale.modules) if (s.heads, s.d, s.depth) == memory]
    for size in sizes:
        for given in (problem(size, clock.device), problem(size, clock.device).leaves()):
            kernels = kernels_for(given)
            clock.milliseconds(lambda p=given, k=kernels: (read(p, k), write(p, k)))
        clock.milliseconds(write_and_backward(given, kernels))
    return len(sizes)


if __name__ == "__main__":
    heads, d, depth = map(int, sys.argv[2:])
    compile_all(SCALES[sys.argv[1]], clock_of("cuda"), (heads, d, depth))
