"""What the kernels take, and the words for why they don't. Nothing here imports Triton unless a GPU is in use."""

import os
from typing import NamedTuple

import torch

__all__ = ["Sizes", "obstacle", "precision"]

_OLDEST_TRITON = (3, 2)
_VECTORS = (torch.float32, torch.bfloat16, torch.float16)


class Sizes(NamedTuple):
    """All that decides whether kernels exist."""

    device: torch.device
    state: torch.dtype
    """of weights, momentum and initial weights"""
    vectors: torch.dtype
    """of keys and values, or of queries"""
    layers: tuple[tuple[int, int], ...]
    """(d_in, d_out) of each layer"""
    chunk_size: int | None
    """None for a read, which has no chunks"""


def obstacle(sizes: Sizes) -> str | None:
    """Why the kernels can't be used, in words, or None if they can.

    Example:
        >>> sizes = Sizes(torch.device("cpu"), torch.float32, torch.float32, ((64, 64),), 64)
        >>> obstacle(sizes)
        'the device is cpu'
    """
    if os.environ.get("MAL_ADAPTER_FUSED") == "0":
        return "MAL_ADAPTER_FUSED=0"
    if reason := _device_obstacle(sizes.device):
        return reason
    if sizes.state != torch.float32:
        return f"the state is {_name(sizes.state)}"
    if sizes.vectors not in _VECTORS:
        return f"keys, values or queries are {_name(sizes.vectors)}"
    if not 1 <= len(sizes.layers) <= 2:
        return f"the memory has {len(sizes.layers)} layers"
    d, h = sizes.layers[0]
    if not 16 <= d <= 128:
        return f"the heads' width {d} is not in 16 … 128"
    if h > 1024:
        return f"the hidden width {h} is above 1024"
    if sizes.chunk_size is not None and sizes.chunk_size > 128:
        return f"chunk_size={sizes.chunk_size} is above 128"
    if sizes.chunk_size is not None and len(sizes.layers) == 2 and d > 64 and sizes.chunk_size > 64:
        return f"chunk_size={sizes.chunk_size} and heads of width {d} take more shared memory than a GPU has"
    return None


def _device_obstacle(device: torch.device) -> str | None:
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return _triton_obstacle()  # Triton's interpreter runs the kernels on the CPU, for tests
    if device.type != "cuda":
        return f"the device is {device.type}"
    if torch.version.hip is not None:
        return "the device is AMD's"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the device has compute capability {major}.{minor}, below 8.0"
    return _triton_obstacle()


def _triton_obstacle() -> str | None:
    try:
        import triton
    except ImportError:
        return "Triton is not installed"
    numbers = tuple(int(n) for n in triton.__version__.split(".")[:2])
    return None if numbers >= _OLDEST_TRITON else f"Triton {triton.__version__} is older than 3.2"


def precision() -> str:
    """How products of float32 are computed, in Triton's words: to float32's accuracy in three products of tf32, or in
    one where the user allows it by `torch.set_float32_matmul_precision`."""
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch ≥ 2.9 raises this where only the newer setting was made
        exact = torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "tf32x3" if exact else "tf32"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
