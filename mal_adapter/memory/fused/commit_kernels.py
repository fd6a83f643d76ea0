"""`mal_adapter.memory.commit` in two launches: which rows of a new state are finite, and what the others keep.

The first launch looks at every number once and leaves a flag per row and block; nothing has to be cleared before. The
second one reads the flags. It writes counters, and the old state over the new one where a row is not finite.
"""

import torch
import triton
import triton.language as tl

from mal_adapter.memory.fused.parts import OPTIONS, mask_arguments
from mal_adapter.memory.rule import Weights

__all__ = ["check_rows", "keep_finite", "keep_rows"]

BLOCK = 1024
"""Numbers of each tensor that a program works on."""


def keep_finite(
    new: Weights,
    old: Weights,
    counters: tuple[torch.Tensor, ...],
    offsets: torch.Tensor,
    valid: torch.Tensor | None,
) -> tuple[Weights, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """`new`, with the rows of `old` where a number of any tensor is not finite, and the new counters.

    What is mutated: `new`, unless it is not contiguous.

    Args:
        new: Weights and momentum after a write, two or four tensors with a row per dialogue, of equal sizes.
        old: The same before it.
        counters: Utterances, tokens and skipped writes before it, (rows,) int64.
        offsets: Where rows begin and the last one ends, (rows + 1) int32.
        valid: (tokens,) bool, the tokens that count; all if None.
    """
    new, old = (tuple(t.contiguous() for t in tensors) for tensors in (new, old))
    rows, size = len(new[0]), new[0][0].numel()
    blocks = triton.cdiv(size, BLOCK)
    flags = torch.empty(rows, blocks, dtype=torch.int32, device=offsets.device)
    counted = torch.empty(3, rows, dtype=torch.int64, device=offsets.device)
    mask, stride, masked = mask_arguments(valid, offsets)
    if rows:
        check_rows[(rows, blocks)](*_four(new), flags, size, blocks, LAYERS=len(new), BLOCK=BLOCK, **OPTIONS)
        keep_rows[(rows, blocks)](
            *_four(new), *_four(old), flags, *counters, counted, offsets, mask, stride, masked, rows, size,
            blocks, LAYERS=len(new), BLOCK=BLOCK, FLAGS=triton.next_power_of_2(blocks), **OPTIONS,
        )  # fmt: skip
    return new, (counted[0], counted[1], counted[2])


def _four(tensors: Weights) -> Weights:
    """A kernel's four arguments; the last two are not used where there are only two tensors."""
    return tensors if len(tensors) == 4 else (*tensors, *tensors)


@triton.jit
def _is_bad(x):
    """1 where a number is not finite: no comparison with NaN is true."""
    return 1 - (tl.abs(x) < float("inf")).to(tl.int32)


@triton.jit
def check_rows(new0, new1, new2, new3, flags, SIZE, BLOCKS, LAYERS: tl.constexpr, BLOCK: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    inside = block * BLOCK + tl.arange(0, BLOCK)
    here, at = inside < SIZE, row * SIZE + inside
    bad = _is_bad(tl.load(new0 + at, mask=here, other=0.0)) | _is_bad(tl.load(new1 + at, mask=here, other=0.0))
    if LAYERS == 4:
        bad |= _is_bad(tl.load(new2 + at, mask=here, other=0.0)) | _is_bad(tl.load(new3 + at, mask=here, other=0.0))
    tl.store(flags + row * BLOCKS + block, tl.max(bad, 0))


@triton.jit
def keep_rows(
    new0, new1, new2, new3, old0, old1, old2, old3, flags, utterances, tokens, skipped, counted, offsets, valid, v_t,
    masked, ROWS, SIZE, BLOCKS, LAYERS: tl.constexpr, BLOCK: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    flag = tl.arange(0, FLAGS)
    bad = tl.max(tl.load(flags + row * BLOCKS + flag, mask=flag < BLOCKS, other=0), 0)
    if bad != 0:
        inside = block * BLOCK + tl.arange(0, BLOCK)
        here, at = inside < SIZE, row * SIZE + inside
        tl.store(new0 + at, tl.load(old0 + at, mask=here), mask=here)
        tl.store(new1 + at, tl.load(old1 + at, mask=here), mask=here)
        if LAYERS == 4:
            tl.store(new2 + at, tl.load(old2 + at, mask=here), mask=here)
            tl.store(new3 + at, tl.load(old3 + at, mask=here), mask=here)
    if block == 0:
        start, end = tl.load(offsets + row).to(tl.int64), tl.load(offsets + row + 1).to(tl.int64)
        count = end - start
        if masked != 0:
            count = end * 0
            for first in range(start, end, BLOCK):
                t = first + tl.arange(0, BLOCK)
                count += tl.sum(tl.load(valid + t * v_t, mask=t < end, other=0).to(tl.int64), 0)
        tried = (count > 0).to(tl.int64)
        kept = 1 - bad.to(tl.int64)
        tl.store(counted + row, tl.load(utterances + row) + tried * kept)
        tl.store(counted + ROWS + row, tl.load(tokens + row) + count * kept)
        tl.store(counted + 2 * ROWS + row, tl.load(skipped + row) + tried * (1 - kept))
