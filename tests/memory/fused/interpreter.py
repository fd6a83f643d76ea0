"""Without a GPU, Triton's interpreter runs the kernels in this process, on the CPU, one program after the other.

Triton decides when it is imported, and when a kernel is defined, whether both are interpreted. So the root conftest
imports them first, and takes the variable away again: elsewhere on a CPU, the package takes PyTorch's code, in the same
process, as it does for a user. (A process of its own for these tests would be one more pytest, whose failures are
hidden in the output of one test, and which workers can't share.)
"""

import importlib.util
import os
import sys

import torch

__all__ = ["INTERPRETED", "VARIABLE", "interpret"]

VARIABLE = "TRITON_INTERPRET"
INTERPRETED = not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def interpret() -> None:
    """Import Triton and the kernels for the interpreter, unless there is a GPU, which runs them compiled."""
    if not INTERPRETED:
        return
    if "triton" in sys.modules:
        raise RuntimeError("Triton is imported already, so its interpreter can't be switched on; import it later")
    os.environ[VARIABLE] = "1"
    try:
        import mal_adapter.memory.fused.commit_kernels
        import mal_adapter.memory.fused.ops  # noqa: F401
    finally:
        del os.environ[VARIABLE]
