"""The memory's answers, M(q), and their derivative, in one launch each: normalisation, W0 + W, SiLU, both products.

Forward: one program per row, head and 64 tokens. Backward: one program per row, head and block of columns (of hidden
units for depth 2) goes over the row's tokens, so that it alone adds to its part of the weights' derivative. The
queries' derivative is a sum over blocks; each program writes its part, and the parts are added up afterwards.
"""

import torch
import triton
import triton.language as tl

from mal_adapter.memory.fused.parts import OPTIONS, aligned, load, load_vectors, padded, silu, store

__all__ = [
    "one_layer_answers",
    "one_layer_answers_backward",
    "read_answers",
    "read_answers_backward",
    "two_layers_answers",
    "two_layers_answers_backward",
]

TOKENS = 64
"""Tokens that a program works on at a time."""

_PLAIN = ["q_t", "q_h", "a_t", "a_h", "N", "HEADS", "TILES"]
_POINTERS = ["queries", "answers", "d_answers", "d_queries", "offsets"]


def read_answers(
    initial: list[torch.Tensor],
    weights: list[torch.Tensor],
    queries: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    normalize: bool,
    precision: str,
) -> torch.Tensor:
    """M(q) in float32, (tokens, heads, d).

    Args:
        initial: Learned initial weights.
        weights: Deviations from them, one per row.
        queries: (tokens, heads, d).
        offsets: Where rows begin and the last one ends, (rows + 1) int32.
        longest: Tokens of the longest row.
        normalize: Whether each query is divided by its length first.
        precision: Triton's name of how float32 products are computed.
    """
    initial, weights = ([aligned(t) for t in layers] for layers in (initial, weights))
    queries = queries if queries.stride(-1) == 1 else queries.contiguous()
    count, heads, d = queries.shape
    answers = torch.empty(count, heads, d, device=queries.device, dtype=torch.float32)
    tiles = triton.cdiv(longest, TOKENS)
    grid = ((len(offsets) - 1) * heads * tiles,)
    numbers = (*queries.stride()[:2], *answers.stride()[:2], count, heads, tiles)
    common = {"D": d, "BD": padded(d), "BT": TOKENS, "NORMALIZE": normalize, "PREC": precision, **OPTIONS}
    if len(weights) == 1:
        one_layer_answers[grid](*initial, *weights, queries, answers, offsets, *numbers, **common, num_warps=4)
    else:
        h = weights[0].shape[-1]
        block = min(padded(h), 64)
        two_layers_answers[grid](
            *initial, *weights, queries, answers, offsets, *numbers, **common, H=h, BH=block,
            NB=triton.cdiv(h, block), num_warps=4,
        )  # fmt: skip
    return answers


def read_answers_backward(
    initial: list[torch.Tensor],
    weights: list[torch.Tensor],
    queries: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    normalize: bool,
    precision: str,
    d_answers: torch.Tensor,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The derivative of `read_answers` with respect to weights and queries. That with respect to the initial weights is
    the first one's sum over rows.

    Args:
        initial: As of `read_answers`, like all up to `precision`.
        weights: See there.
        queries: See there.
        offsets: See there.
        longest: See there.
        normalize: See there.
        precision: See there.
        d_answers: With respect to the answers.
    """
    initial, weights = ([aligned(t) for t in layers] for layers in (initial, weights))
    queries, d_answers = (t if t.stride(-1) == 1 else t.contiguous() for t in (queries, d_answers))
    count, heads, d = queries.shape
    rows, two = len(offsets) - 1, len(weights) == 2
    h = weights[0].shape[-1]
    block = min(padded(h), 64 if padded(d) <= 64 else 32)  # what more would need too much shared memory
    parts = triton.cdiv(h, block)
    d_weights = [torch.empty_like(w) for w in weights]
    d_queries = torch.empty(parts, count, heads, d, device=queries.device, dtype=torch.float32)
    numbers = (*queries.stride()[:2], *d_answers.stride()[:2], count, heads)
    common = {"D": d, "BD": padded(d), "BT": TOKENS, "NORMALIZE": normalize, "PREC": precision, **OPTIONS}
    kernel = two_layers_answers_backward if two else one_layer_answers_backward
    more = {"H": h} if two else {}
    kernel[(rows * heads * parts,)](
        *initial, *weights, *d_weights, queries, d_answers, d_queries, offsets, *numbers,
        **common, **more, BH=block, G=parts, num_warps=4 if padded(d) <= 64 else 8,
    )  # fmt: skip
    return d_weights, d_queries[0] if parts == 1 else d_queries.sum(0)


@triton.jit
def _queries(queries, t, here, dd, q_t, D: tl.constexpr, BD: tl.constexpr, NORMALIZE: tl.constexpr):
    """The queries, and 1 / their lengths; as torch.nn.functional.normalize."""
    q = load_vectors(queries, t, here, dd, q_t, D, BD)
    if NORMALIZE:
        scale = 1.0 / tl.maximum(tl.sqrt(tl.sum(q * q, 1)), 1e-12, propagate_nan=tl.PropagateNan.ALL)
        return q * scale[:, None], scale
    else:
        return q, tl.full((q.shape[0],), 1.0, tl.float32)


@triton.jit
def _queries_backward(dq, q, scale, NORMALIZE: tl.constexpr):
    """The derivative through the normalisation; below the smallest length, it is a multiplication."""
    if NORMALIZE:
        along = tl.where(scale < 1e12, tl.sum(dq * q, 1), 0.0)
        return (dq - q * along[:, None]) * scale[:, None]
    else:
        return dq


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_POINTERS)
def one_layer_answers(
    init, w, queries, answers, offsets, q_t, q_h, a_t, a_h, N, HEADS, TILES,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, NORMALIZE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One program per row, head and tile of tokens."""
    n = tl.program_id(0).to(tl.int64) // TILES
    tile = tl.program_id(0) % TILES
    row = n // HEADS
    head = n % HEADS
    t = tl.load(offsets + row).to(tl.int64) + tile * BT + tl.arange(0, BT)
    here = t < tl.load(offsets + row + 1)
    dd = tl.arange(0, BD)
    at = dd[:, None] * D + dd[None, :]
    ok = (dd < D)[:, None] & (dd < D)[None, :]
    q, _ = _queries(queries + head * q_h, t, here, dd, q_t, D, BD, NORMALIZE)
    now = load(w + n * (D * D) + at, ok, BD == D) + load(init + head * (D * D) + at, ok, BD == D)
    answer = tl.dot(q, now, input_precision=PREC)
    tl.store(answers + head * a_h + t[:, None] * a_t + dd[None, :], answer, mask=here[:, None] & (dd < D)[None, :])


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_POINTERS)
def two_layers_answers(
    init1, init2, w1, w2, queries, answers, offsets, q_t, q_h, a_t, a_h, N, HEADS, TILES,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, NORMALIZE: tl.constexpr, PREC: tl.constexpr,
    H: tl.constexpr, BH: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """One program per row, head and tile of tokens, over blocks of hidden units."""
    EXACT: tl.constexpr = (BD == D) and (NB * BH == H)
    n = tl.program_id(0).to(tl.int64) // TILES
    tile = tl.program_id(0) % TILES
    row = n // HEADS
    head = n % HEADS
    t = tl.load(offsets + row).to(tl.int64) + tile * BT + tl.arange(0, BT)
    here = t < tl.load(offsets + row + 1)
    dd = tl.arange(0, BD)
    state = n * (D * H)
    init1 += head * (D * H)
    init2 += head * (D * H)
    q, _ = _queries(queries + head * q_h, t, here, dd, q_t, D, BD, NORMALIZE)
    answer = tl.zeros((BT, BD), tl.float32)
    for j in range(NB):
        hh = j * BH + tl.arange(0, BH)
        at1 = dd[:, None] * H + hh[None, :]
        at2 = hh[:, None] * D + dd[None, :]
        ok1 = (dd < D)[:, None] & (hh < H)[None, :]
        ok2 = (hh < H)[:, None] & (dd < D)[None, :]
        now = load(w1 + state + at1, ok1, EXACT) + load(init1 + at1, ok1, EXACT)
        a, _sigmoid = silu(tl.dot(q, now, input_precision=PREC))
        now = load(w2 + state + at2, ok2, EXACT) + load(init2 + at2, ok2, EXACT)
        answer = tl.dot(a, now, acc=answer, input_precision=PREC)
    tl.store(answers + head * a_h + t[:, None] * a_t + dd[None, :], answer, mask=here[:, None] & (dd < D)[None, :])


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_POINTERS)
def one_layer_answers_backward(
    init, w, d_w, queries, d_answers, d_queries, offsets, q_t, q_h, a_t, a_h, N, HEADS,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, NORMALIZE: tl.constexpr, PREC: tl.constexpr,
    BH: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """One program per row, head and block of output columns."""
    n = tl.program_id(0).to(tl.int64) // G
    g = tl.program_id(0).to(tl.int64) % G
    row = n // HEADS
    head = n % HEADS
    start = tl.load(offsets + row).to(tl.int64)
    end = tl.load(offsets + row + 1).to(tl.int64)
    dd = tl.arange(0, BD)
    oo = g.to(tl.int32) * BH + tl.arange(0, BH)
    at = dd[:, None] * D + oo[None, :]
    ok = (dd < D)[:, None] & (oo < D)[None, :]
    queries += head * q_h
    d_answers += head * a_h
    d_queries += (g * N * HEADS + head) * D
    now = load(w + n * (D * D) + at, ok, BD == D) + load(init + head * (D * D) + at, ok, BD == D)
    dw = tl.zeros((BD, BH), tl.float32)
    for first in range(start, end, BT):
        t = first + tl.arange(0, BT)
        here = t < end
        q, scale = _queries(queries, t, here, dd, q_t, D, BD, NORMALIZE)
        dy = load_vectors(d_answers, t, here, oo, a_t, D, -1)
        dw = tl.dot(tl.trans(q), dy, acc=dw, input_precision=PREC)
        dq = tl.dot(dy, tl.trans(now), input_precision=PREC)
        dq = _queries_backward(dq, q, scale, NORMALIZE)
        tl.store(d_queries + t[:, None] * HEADS * D + dd[None, :], dq, mask=here[:, None] & (dd < D)[None, :])
    store(d_w + n * (D * D) + at, dw, ok, BD == D)


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_POINTERS)
def two_layers_answers_backward(
    init1, init2, w1, w2, d_w1, d_w2, queries, d_answers, d_queries, offsets, q_t, q_h, a_t, a_h, N, HEADS,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, NORMALIZE: tl.constexpr, PREC: tl.constexpr,
    H: tl.constexpr, BH: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """One program per row, head and block of hidden units."""
    EXACT: tl.constexpr = (BD == D) and (G * BH == H)
    n = tl.program_id(0).to(tl.int64) // G
    g = tl.program_id(0).to(tl.int64) % G
    row = n // HEADS
    head = n % HEADS
    start = tl.load(offsets + row).to(tl.int64)
    end = tl.load(offsets + row + 1).to(tl.int64)
    dd = tl.arange(0, BD)
    hh = g.to(tl.int32) * BH + tl.arange(0, BH)
    at1 = dd[:, None] * H + hh[None, :]
    at2 = hh[:, None] * D + dd[None, :]
    ok1 = (dd < D)[:, None] & (hh < H)[None, :]
    ok2 = (hh < H)[:, None] & (dd < D)[None, :]
    state = n * (D * H)
    queries += head * q_h
    d_answers += head * a_h
    d_queries += (g * N * HEADS + head) * D
    now1 = load(w1 + state + at1, ok1, EXACT) + load(init1 + head * (D * H) + at1, ok1, EXACT)
    now2 = load(w2 + state + at2, ok2, EXACT) + load(init2 + head * (D * H) + at2, ok2, EXACT)
    dw1 = tl.zeros((BD, BH), tl.float32)
    dw2 = tl.zeros((BH, BD), tl.float32)
    for first in range(start, end, BT):
        t = first + tl.arange(0, BT)
        here = t < end
        q, scale = _queries(queries, t, here, dd, q_t, D, BD, NORMALIZE)
        dy = load_vectors(d_answers, t, here, dd, a_t, D, BD)
        a, sigmoid = silu(tl.dot(q, now1, input_precision=PREC))
        dw2 = tl.dot(tl.trans(a), dy, acc=dw2, input_precision=PREC)
        dz = tl.dot(dy, tl.trans(now2), input_precision=PREC) * (sigmoid + a * (1.0 - sigmoid))
        dw1 = tl.dot(tl.trans(q), dz, acc=dw1, input_precision=PREC)
        dq = tl.dot(dz, tl.trans(now1), input_precision=PREC)
        dq = _queries_backward(dq, q, scale, NORMALIZE)
        tl.store(d_queries + t[:, None] * HEADS * D + dd[None, :], dq, mask=here[:, None] & (dd < D)[None, :])
    store(d_w1 + state + at1, dw1, ok1, EXACT)
    store(d_w2 + state + at2, dw2, ok2, EXACT)
