"""Every kernel compiles for the GPUs that people have, though there is none here, and fits into their shared memory."""

import json
import os
import subprocess
import sys

import pytest

from tests.memory.fused.interpreter import INTERPRETED, VARIABLE

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton has the driver of a real GPU here")

SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""What one program may take on an A100 and an H100; NVIDIA's table of compute capabilities."""

KERNELS = {
    1: {"one_layer", "one_layer_backward", "one_layer_answers", "one_layer_answers_backward"},
    2: {"two_layers", "two_layers_backward", "two_layers_answers", "two_layers_answers_backward"},
}
SCALARS = {"forward_kernel", "backward_kernel"}


def compiled(capability: int, *options: str) -> list[dict]:
    """What ptxas gives to each kernel, from a process of its own; see compile_kernels.py."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    command = [sys.executable, "-m", "tests.memory.fused.compile_kernels", str(capability), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_kernels_of_a_forward_at_depth_1_compile():
    lines = compiled(90, "--depth", "1", "--width", "32", "--only", "write")
    assert {line["kernel"] for line in lines} == {"forward_kernel", "one_layer"}
    assert all(line["shared"] <= SHARED[90] for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("depth", [1, 2])
def test_all_kernels_of_the_default_sizes_compile_and_fit(capability, depth):
    lines = compiled(capability, "--depth", str(depth))
    assert {line["kernel"] for line in lines} == KERNELS[depth] | SCALARS
    assert [line for line in lines if line["shared"] > SHARED[capability]] == []


@pytest.mark.slow
def test_the_widest_heads_compile_by_blocks_and_fit():
    lines = compiled(90, "--width", "128", "--heads", "2")
    assert {line["kernel"] for line in lines} >= {"two_layers_by_blocks", "two_layers_backward"}
    assert [line for line in lines if line["shared"] > SHARED[90]] == []
