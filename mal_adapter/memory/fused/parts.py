"""What the kernels share: loads of tokens and of state, the activation, the bound of a step.

A program works on one row and head. The row's tokens are `offsets[row]` … `offsets[row + 1]` of the flat list; its
chunks start at the first of them. Results per chunk are in slots: those of a row begin at `offsets[row] // C + row`,
which leaves room for every chunk of every earlier row, whatever their lengths. So no launch waits for the lengths.
"""

import torch
import triton
import triton.language as tl

from mal_adapter.memory.chunk import MAX_SILU_SLOPE

__all__ = [
    "LAYERED",
    "OPTIONS",
    "aligned",
    "bound_of",
    "count_slots",
    "is_live",
    "load",
    "load_vectors",
    "mask_arguments",
    "padded",
    "silu",
    "sizes_of_row",
    "store",
]

OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}
"""Of every launch: no software pipelining, which would need shared memory for a second chunk."""

LAYERED = tl.constexpr(MAX_SILU_SLOPE**2)
"""MAX_SILU_SLOPE², see `mal_adapter.memory.chunk`."""


def mask_arguments(valid: torch.Tensor | None, offsets: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """A kernel's three arguments for a mask: bytes, stride, and whether there is one; if not, any pointer will do."""
    return (offsets.view(torch.uint8), 0, 0) if valid is None else (valid.view(torch.uint8), valid.stride(0), 1)


def padded(size: int) -> int:
    """The side of a block that holds `size` numbers; the tensor cores need at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def count_slots(tokens: int, rows: int, chunk_size: int) -> int:
    """The slots of all chunks of all rows."""
    return tokens // chunk_size + rows


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous and aligned to 16 bytes. Triton would compile once more, for seconds, for another alignment."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@triton.jit
def sizes_of_row(offsets, row, C):
    """First token, end, number of chunks and first slot of a row."""
    start = tl.load(offsets + row).to(tl.int64)
    end = tl.load(offsets + row + 1).to(tl.int64)
    return start, end, (end - start + C - 1) // C, start // C + row


@triton.jit
def is_live(valid, t, v_t, masked, here):
    """Whether each token exists and is valid. `masked` is 0 where there is no mask: a number, and not a constant, which
    would double the kernels to compile."""
    asked = here & (t * 0 + masked != 0)  # per token, because the interpreter makes integers of `here & scalar`
    return here & (tl.load(valid + t * v_t, mask=asked, other=1) != 0)


@triton.jit
def load_vectors(at, t, live, column, stride, D: tl.constexpr, BD: tl.constexpr):
    """A vector per token in float32, zero where it is not live: what is stored there is never seen."""
    ok = live[:, None]
    if BD != D:
        ok = ok & (column < D)[None, :]
    return tl.load(at + t[:, None] * stride + column[None, :], mask=ok, other=0.0).to(tl.float32)


@triton.jit
def load(at, ok, EXACT: tl.constexpr):
    if EXACT:
        return tl.load(at)
    else:
        return tl.load(at, mask=ok, other=0.0)


@triton.jit
def store(at, x, ok, EXACT: tl.constexpr):
    if EXACT:
        tl.store(at, x)
    else:
        tl.store(at, x, mask=ok)


@triton.jit
def silu(z):
    """SiLU(z), and its sigmoid."""
    sigmoid = 1.0 / (1.0 + tl.exp(-z))
    return z * sigmoid, sigmoid


@triton.jit
def bound_of(total_w, total_s):
    """The divisor of a chunk's errors, ≥ 1; see `_bound` in `mal_adapter.memory.chunk`. NaN stays NaN, so that the
    adapter finds and skips such a write."""
    bound = tl.maximum(total_w, total_s, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(bound, 1.0, propagate_nan=tl.PropagateNan.ALL)
