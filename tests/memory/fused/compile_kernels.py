"""Compile the kernels for a GPU that isn't here: each launch of the host code compiles, and stops.

    python -m tests.memory.fused.compile_kernels 90 --width 64 --chunk-size 64 --depth 2

prints one line of JSON per kernel: its name, registers per thread, bytes of stack per thread (spills are in it), bytes
of shared memory. Run it in a process of its own: Triton gets a driver that has no device.
"""

import argparse
import json
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class NoDevice:
    """A driver of a device of some compute capability which has no device."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def resources(kernel: Any) -> dict[str, int]:
    """What ptxas has given a compiled kernel."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        out = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    found = dict(re.findall(r"(REG|STACK):(\d+)", out.stdout))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]), "shared": kernel.metadata.shared}


def compile_instead_of_launching(capability: int) -> list[dict[str, Any]]:
    """From now on, launches compile and do nothing else. Returns the list that gets a line for each kernel."""
    lines: list[dict[str, Any]] = []
    triton.runtime.driver.set_active(NoDevice(capability))
    compile_and_launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        start = time.perf_counter()
        kernel = compile_and_launch(self, *args, grid=grid, warmup=True, **kwargs)
        seconds = round(time.perf_counter() - start, 1)
        lines.append(
            {"kernel": self.__name__, "warps": kernel.metadata.num_warps, **resources(kernel), "seconds": seconds}
        )

    JITFunction.run = run
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("capability", type=int)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--chunk-size", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--expansion", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--precision", default="tf32x3")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", default="write,saving,backward,read")
    options = parser.parse_args()
    lines = compile_instead_of_launching(options.capability)

    from mal_adapter.memory.fused import read_kernels, scalars, write_backward, write_kernels

    d, h, heads, tokens = options.width, options.expansion * options.width, options.heads, 100
    dtype = getattr(torch, options.dtype)
    shapes = [(d, d)] if options.depth == 1 else [(d, h), (h, d)]
    initial = [torch.zeros(heads, *shape) for shape in shapes]
    state = [torch.zeros(1, heads, *shape) for shape in shapes]
    vectors = torch.zeros(tokens, heads, d, dtype=dtype)
    gates = [torch.zeros(tokens, heads, dtype=dtype)] * 3
    offsets = torch.tensor([0, tokens], dtype=torch.int32)
    parts = options.only.split(",")
    chunks = (offsets, None, options.chunk_size)
    per_token, whole = scalars.chunk_scalars(*gates, *chunks, tokens)
    saved = write_kernels.Saved.empty(state, whole.shape[2], options.chunk_size)
    for save in [part == "saving" for part in parts if part in ("write", "saving")]:
        write_kernels.write_chunks(
            initial, state, state, vectors, vectors, per_token, whole, *chunks, options.precision, save
        )
    if "backward" in parts:
        scalars.chunk_scalars_backward(*gates, *chunks, tokens, per_token, whole)
        write_backward.write_chunks_backward(
            initial, saved, vectors, per_token, whole, *chunks, options.precision, state, state
        )
    if "read" in parts:
        arguments = (initial, state, vectors, offsets, tokens, True, options.precision)
        read_kernels.read_answers(*arguments)
        read_kernels.read_answers_backward(*arguments, vectors)
    for line in lines:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
