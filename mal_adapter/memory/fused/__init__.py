"""A memory's reads and writes as few launches on an NVIDIA GPU, in Triton; the equations are in `titans`.

Everything here takes tokens in one flat list, (tokens, heads, d) with any strides, and `Spans` that says where each row
is. Importing this package does not import Triton; the first call on a GPU does.
"""

import logging
import time
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mal_adapter.memory.config import MemoryConfig
from mal_adapter.memory.fused.support import Sizes, obstacle, precision
from mal_adapter.memory.gates import Gates
from mal_adapter.memory.rule import InitialWeights, Weights
from mal_adapter.memory.spans import Spans

__all__ = ["path", "read", "takes_read", "takes_write", "warm_up", "write"]

_log = logging.getLogger("mal_adapter")

Vectors = Float[Tensor, "tokens heads _head_dim"]
"""A vector per token and head."""


def takes_write(initial: InitialWeights, keys: Tensor, chunk_size: int) -> bool:
    """Whether `write` takes tensors of these sizes, dtypes and device, in any layout.

    The first call for some sizes on a GPU compiles the kernels, unless `warm_up` has done so.

    Args:
        initial: Learned initial weights; the state has their dtype.
        keys: One per token and head; or any tensor of their dtype and device.
        chunk_size: Tokens per chunk.
    """
    return _obstacle(_sizes(initial, keys, chunk_size), _records(*initial, keys)) is None


def takes_read(initial: InitialWeights, queries: Tensor) -> bool:
    """Whether `read` takes tensors of these sizes, dtypes and device, in any layout; compiles as `takes_write`.

    Args:
        initial: Learned initial weights; the state has their dtype.
        queries: One per token and head; or any tensor of their dtype and device.
    """
    return _obstacle(_sizes(initial, queries, None), _records(*initial, queries)) is None


def write(
    initial: InitialWeights,
    weights: Weights,
    momentum: Weights,
    keys: Vectors,
    values: Vectors,
    gates: Gates,
    spans: Spans,
    valid: Bool[Tensor, " tokens"] | None,
    chunk_size: int,
) -> tuple[Weights, Weights]:
    """`mal_adapter.memory.titans.write` in two launches; differentiable once, in two more.

    The chunks of a row start at its first token. A row without tokens keeps its state, bit for bit.

    Args:
        initial: Learned initial weights, float32.
        weights: Deviations from `initial`, one per row, float32.
        momentum: Shapes as of `weights`.
        keys: float32, bfloat16 or float16.
        values: As `keys`.
        gates: Logits, (tokens, heads), any float dtype.
        spans: Where each row's tokens are.
        valid: (tokens,); a token with False has no effect, whatever its key, value and gates are.
        chunk_size: Tokens per chunk, 1 … 128.

    Returns:
        New (weights, momentum).
    """
    if spans.longest == 0:
        return weights, momentum
    from mal_adapter.memory.fused.ops import titans_write

    save = _records(*initial, *weights, *momentum, keys, values, *gates)
    state = (list(initial), list(weights), list(momentum))
    rows = (spans.offsets, valid, chunk_size, spans.longest)
    out = titans_write(*state, keys, values, *gates, *rows, save)
    layers = len(initial)
    return tuple(out[:layers]), tuple(out[layers : 2 * layers])


def read(
    initial: InitialWeights, weights: Weights, queries: Vectors, spans: Spans, *, normalize: bool = False
) -> Vectors:
    """`mal_adapter.memory.titans.read` in one launch; differentiable once, in one more.

    Args:
        initial: Learned initial weights, float32.
        weights: Deviations from `initial`, one per row, float32.
        queries: float32, bfloat16 or float16.
        spans: Where each row's tokens are.
        normalize: Divide each query by its length first, as `torch.nn.functional.normalize` does.

    Returns:
        The answers, (tokens, heads, d) in float32.
    """
    if spans.longest == 0:
        return queries.to(weights[0].dtype)
    from mal_adapter.memory.fused.ops import titans_read

    answers: Tensor = titans_read(list(initial), list(weights), queries, spans.offsets, spans.longest, normalize)
    return answers


def path(config: MemoryConfig, device: torch.device, dtype: torch.dtype = torch.float32, training: bool = False) -> str:
    """Which code writes a memory of this configuration, and why.

    Args:
        config: Sizes of the memory.
        device: Where the memory is.
        dtype: Of keys and values.
        training: Whether the derivative is needed.

    Example:
        >>> path(MemoryConfig(), torch.device("cpu"))
        'PyTorch: the device is cpu'
    """
    if config.update not in ("titans", "answers", "none"):  # the kernels read for the last two too, which write nothing
        return f"PyTorch: the update is {config.update}"
    reason = _obstacle(Sizes(device, torch.float32, dtype, config.layer_shapes, config.chunk_size), training)
    return f"fused ({precision()})" if reason is None else f"PyTorch: {reason}"


def warm_up(
    config: MemoryConfig, device: torch.device, dtype: torch.dtype = torch.float32, training: bool = False
) -> None:
    """Compile the kernels of this configuration, for tens of seconds the first time; Triton keeps them on disk.

    If they can't be compiled or run, this is logged, and PyTorch computes the memory.

    Args:
        config: Sizes of the memory.
        device: Where the memory is; on a device without kernels nothing happens.
        dtype: Of keys, values and queries.
        training: Whether the derivatives are needed.
    """
    start = time.perf_counter()
    if path(config, device, dtype, training).startswith("fused"):
        _obstacle(Sizes(device, torch.float32, dtype, config.layer_shapes, None), training)
        _log.info("The memory's kernels are ready after %.1f s", time.perf_counter() - start)


def _obstacle(sizes: Sizes, training: bool) -> str | None:
    reason = obstacle(sizes)
    if reason is not None or sizes.device.type == "cpu":
        return reason
    from mal_adapter.memory.fused.trial import failure

    return failure(sizes, training)


def _records(*tensors: Tensor) -> bool:
    """Whether a gradient with respect to any of them is recorded."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _sizes(initial: Sequence[Tensor], vectors: Tensor, chunk_size: int | None) -> Sizes:
    layers = tuple((layer.shape[-2], layer.shape[-1]) for layer in initial)
    return Sizes(vectors.device, initial[0].dtype, vectors.dtype, layers, chunk_size)
