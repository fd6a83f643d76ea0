"""A whole write, all chunks of all rows, in one launch: one program per row and head goes through the row's chunks.

The equations are in `mal_adapter.memory.titans`. Here the hidden dimension comes first (W1 transposed, W2: (h, d); z, a
and back: (h, tokens)), so that the long side is the M of the tensor cores' products.

- `one_layer`: depth 1. The columns of the matrix do not meet, because the bound depends on keys and gates alone. They
  are divided among programs.
- `two_layers`: depth 2, up to 8192 numbers per layer. The weights stay in registers, the momentum is in L2.
- `two_layers_by_blocks`: larger ones. The same program goes over blocks of hidden units, twice per chunk, with the
  state in L2. No program waits for another one, so none can hang, whatever else runs on the device.

With `SAVE`, they keep what the derivative needs: W and S at the start of each chunk, and the chunk's z, back, errors
and five numbers.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mal_adapter.memory.fused.parts import (
    LAYERED,
    OPTIONS,
    aligned,
    bound_of,
    is_live,
    load,
    load_vectors,
    mask_arguments,
    padded,
    silu,
    sizes_of_row,
    store,
)

__all__ = [
    "ONE_BLOCK",
    "Saved",
    "chunk_numbers",
    "column_block",
    "one_layer",
    "token_scalars",
    "two_layers",
    "two_layers_by_blocks",
    "write_chunks",
]

_PLAIN = ["k_t", "k_h", "x_t", "x_h", "v_t", "masked", "N", "SLOTS", "HEADS", "C"]
_POINTERS = ["keys", "values", "valid", "offsets", "tokens", "whole"]

ONE_BLOCK = 8192
"""Numbers of a layer that fit into the registers of a program of eight warps."""


class Saved(NamedTuple):
    """What a write keeps for its derivative; slots as in `mal_adapter.memory.fused.parts`."""

    weights: list[torch.Tensor]
    """W at the start of each chunk, (slots, heads, d_in, d_out) per layer"""
    momentum: list[torch.Tensor]
    """S at the start of each chunk"""
    errors: torch.Tensor
    """(slots, heads, chunk, d), all sizes here and below padded to blocks"""
    hidden: torch.Tensor
    """z and back, (2, slots, heads, h, chunk); empty for depth 1"""
    stats: torch.Tensor
    """The two totals, ‖W2‖² max|SiLU'|² and Σ reach ‖k‖², (slots, heads, 5); empty for depth 1"""

    def flat(self) -> list[torch.Tensor]:
        """All tensors in one list."""
        return [*self.weights, *self.momentum, self.errors, self.hidden, self.stats]

    @classmethod
    def of(cls, tensors: list[torch.Tensor], layers: int) -> "Saved":
        """The inverse of `flat`."""
        return cls(tensors[:layers], tensors[layers : 2 * layers], *tensors[2 * layers :])

    @classmethod
    def empty(cls, weights: list[torch.Tensor], slots: int, chunk_size: int) -> "Saved":
        """Room for `slots` chunks.

        Args:
            weights: The state's; they give device and sizes.
            slots: Room for so many chunks.
            chunk_size: Tokens per chunk.
        """
        heads, d, h = weights[0].shape[1:]
        two = len(weights) == 2
        block = column_block(d, h, chunk_size)

        def room(*shape: int) -> torch.Tensor:
            return weights[0].new_empty(shape, dtype=torch.float32)

        states = ([room(slots, *w.shape[1:]) for w in weights], [room(slots, *w.shape[1:]) for w in weights])
        all_hidden = -(-h // block) * block
        return cls(
            *states,
            room(slots, heads, padded(chunk_size), padded(d)),
            room(2, slots, heads, all_hidden, padded(chunk_size)) if two else room(0),
            room(slots, heads, 5) if two else room(0),
        )


def column_block(d: int, h: int, chunk_size: int) -> int:
    """Hidden units that `two_layers` and `two_layers_by_blocks` work on at a time."""
    widest = max(padded(d), padded(chunk_size))
    return padded(h) if padded(h) * widest <= ONE_BLOCK else min(padded(h), 64)


def write_chunks(
    initial: list[torch.Tensor],
    weights: list[torch.Tensor],
    momentum: list[torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
    tokens: torch.Tensor,
    whole: torch.Tensor,
    offsets: torch.Tensor,
    valid: torch.Tensor | None,
    chunk_size: int,
    precision: str,
    save: bool,
) -> tuple[list[torch.Tensor], list[torch.Tensor], Saved | None]:
    """The weights and the momentum after the write, as new tensors.

    Args:
        initial: Learned initial weights.
        weights: Deviations from them.
        momentum: Shapes as of `weights`.
        keys: (tokens, heads, d).
        values: Shape as of `keys`.
        tokens: As of `chunk_scalars`.
        whole: As of `chunk_scalars`.
        offsets: (rows + 1) int32.
        valid: (tokens,) bool.
        chunk_size: Tokens per chunk.
        precision: Triton's name of how float32 products are computed.
        save: Whether to keep what the derivative needs.
    """
    initial, weights, momentum = ([aligned(t) for t in layers] for layers in (initial, weights, momentum))
    keys, values = (t if t.stride(-1) == 1 else t.contiguous() for t in (keys, values))
    count, heads, d = keys.shape
    rows, slots = len(offsets) - 1, whole.shape[2]
    h = weights[0].shape[-1]
    new_weights, new_momentum = ([torch.empty_like(t) for t in layers] for layers in (weights, momentum))
    saved = Saved.empty(weights, slots, chunk_size) if save else None
    unused = new_weights[0]
    mask, *masked = mask_arguments(valid, offsets)
    inputs = (keys, values, mask, offsets, tokens, whole)
    numbers = (*keys.stride()[:2], *values.stride()[:2], *masked, count, slots, heads, chunk_size)
    common = {"SAVE": save, "PREC": precision, "D": d, **OPTIONS}
    bc, bd = padded(chunk_size), padded(d)
    common |= {"BC": bc, "BD": bd}
    state = (*initial, *weights, *momentum, *new_weights, *new_momentum)
    if len(weights) == 1:
        kept = (*saved.weights, *saved.momentum, saved.errors) if saved else (unused,) * 3
        block = min(bd, 32)
        one_layer[(rows * heads * (bd // block),)](*state, *kept, *inputs, *numbers, **common, BO=block, num_warps=4)
        return new_weights, new_momentum, saved
    block = column_block(d, h, chunk_size)
    kept = (*saved.weights, *saved.momentum, saved.errors, *saved.hidden, saved.stats) if saved else (unused,) * 8
    if block >= h:
        two_layers[(rows * heads,)](
            *state, *kept, *inputs, *numbers, **common, H=h, BH=block,
            num_warps=max(4, min(8, block // 16)),
        )  # fmt: skip
        return new_weights, new_momentum, saved
    blocks = triton.cdiv(h, block)
    scratch = (
        unused
        if save
        else torch.empty(rows * heads, (blocks * block + bd) * bc, device=keys.device, dtype=torch.float32)
    )
    two_layers_by_blocks[(rows * heads,)](
        *state, *kept, scratch, *inputs, *numbers, **common, H=h, BH=block, NB=blocks,
        num_warps=4 if bc * bd <= ONE_BLOCK else 8,
    )  # fmt: skip
    return new_weights, new_momentum, saved


@triton.jit
def token_scalars(tokens, t, here, head, N, HEADS):
    """θ c, θ p and reach of a chunk's tokens."""
    layer = (head * 0 + HEADS) * N  # in 64 bits
    at = tokens + head * N + t
    to_w = tl.load(at, mask=here, other=0.0)
    to_s = tl.load(at + layer, mask=here, other=0.0)
    reach = tl.load(at + 2 * layer, mask=here, other=0.0)
    return to_w, to_s, reach


@triton.jit
def chunk_numbers(whole, slot, head, SLOTS, HEADS):
    """decay, carry and persist of a chunk."""
    layer = (head * 0 + HEADS) * SLOTS
    at = whole + head * SLOTS + slot
    return tl.load(at), tl.load(at + layer), tl.load(at + 2 * layer)


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_POINTERS)
def one_layer(
    init, w_in, s_in, w_out, s_out, w_all, s_all, e_all,
    keys, values, valid, offsets, tokens, whole, k_t, k_h, x_t, x_h, v_t, masked, N, SLOTS, HEADS, C,
    D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BO: tl.constexpr,
    SAVE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One program per row, head and block of output columns."""
    G: tl.constexpr = BD // BO
    n = tl.program_id(0).to(tl.int64) // G
    row = n // HEADS
    head = n % HEADS
    start, end, chunks, slot = sizes_of_row(offsets, row, C)
    i = tl.arange(0, BC)
    dd = tl.arange(0, BD)
    oo = (tl.program_id(0) % G) * BO + tl.arange(0, BO)
    at_w = dd[:, None] * D + oo[None, :]
    ok_w = (dd < D)[:, None] & (oo < D)[None, :]
    EXACT: tl.constexpr = BD == D
    keys += head * k_h
    values += head * x_h
    w = load(w_in + n * (D * D) + at_w, ok_w, EXACT)
    s = load(s_in + n * (D * D) + at_w, ok_w, EXACT)
    w0 = load(init + head * (D * D) + at_w, ok_w, EXACT)
    for chunk in range(chunks):
        t = start + chunk * C + i
        here = (i < C) & (t < end)
        live = is_live(valid, t, v_t, masked, here)
        k = load_vectors(keys, t, live, dd, k_t, D, BD)
        x = load_vectors(values, t, live, oo, x_t, D, -1)
        to_w, to_s, reach = token_scalars(tokens, t, here, head, N, HEADS)
        decay, carry, persist = chunk_numbers(whole, slot + chunk, head, SLOTS, HEADS)
        spot = (slot + chunk) * HEADS + head
        if SAVE:
            store(w_all + spot * (D * D) + at_w, w, ok_w, EXACT)
            store(s_all + spot * (D * D) + at_w, s, ok_w, EXACT)
        k_square = tl.sum(k * k, 1)
        bound = bound_of(tl.sum(k_square * to_w, 0), tl.sum(k_square * reach, 0))
        e = (x - tl.dot(k, w + w0, input_precision=PREC)) / bound
        if SAVE:
            tl.store(e_all + spot * (BC * BD) + i[:, None] * BD + oo[None, :], e)
        k_back = tl.trans(k)
        w = tl.dot(k_back, e * to_w[:, None], acc=decay * w + carry * s, input_precision=PREC)
        s = tl.dot(k_back, e * to_s[:, None], acc=persist * s, input_precision=PREC)
    store(w_out + n * (D * D) + at_w, w, ok_w, EXACT)
    store(s_out + n * (D * D) + at_w, s, ok_w, EXACT)


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_POINTERS)
def two_layers(
    init1, init2, w1_in, w2_in, s1_in, s2_in, w1_out, w2_out, s1_out, s2_out,
    w1_all, w2_all, s1_all, s2_all, e_all, z_all, back_all, stats,
    keys, values, valid, offsets, tokens, whole, k_t, k_h, x_t, x_h, v_t, masked, N, SLOTS, HEADS, C,
    D: tl.constexpr, H: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr,
    SAVE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One program per row and head. W stays in registers; S is read from L2 and written back once per chunk."""
    EXACT: tl.constexpr = (BD == D) and (BH == H)
    n = tl.program_id(0).to(tl.int64)
    row = n // HEADS
    head = n % HEADS
    start, end, chunks, slot = sizes_of_row(offsets, row, C)
    i = tl.arange(0, BC)
    dd = tl.arange(0, BD)
    hh = tl.arange(0, BH)
    at1 = hh[:, None] + dd[None, :] * H  # W1 is stored as (d, h)
    at2 = hh[:, None] * D + dd[None, :]
    ok = (hh < H)[:, None] & (dd < D)[None, :]
    hidden = hh[:, None] * BC + i[None, :]
    init1 += head * (D * H)
    init2 += head * (D * H)
    keys += head * k_h
    values += head * x_h
    state = n * (D * H)
    w1 = load(w1_in + state + at1, ok, EXACT)
    w2 = load(w2_in + state + at2, ok, EXACT)
    store(s1_out + state + at1, load(s1_in + state + at1, ok, EXACT), ok, EXACT)
    store(s2_out + state + at2, load(s2_in + state + at2, ok, EXACT), ok, EXACT)
    tl.debug_barrier()

    for chunk in range(chunks):
        t = start + chunk * C + i
        here = (i < C) & (t < end)
        live = is_live(valid, t, v_t, masked, here)
        k = load_vectors(keys, t, live, dd, k_t, D, BD)
        x = load_vectors(values, t, live, dd, x_t, D, BD)
        to_w, to_s, reach = token_scalars(tokens, t, here, head, N, HEADS)
        decay, carry, persist = chunk_numbers(whole, slot + chunk, head, SLOTS, HEADS)
        spot = (slot + chunk) * HEADS + head
        if SAVE:
            store(w1_all + spot * (D * H) + at1, w1, ok, EXACT)
            store(w2_all + spot * (D * H) + at2, w2, ok, EXACT)
        k_square = tl.sum(k * k, 1)
        keys_w = tl.sum(k_square * to_w, 0)
        keys_s = tl.sum(k_square * reach, 0)

        z = tl.dot(w1 + load(init1 + at1, ok, EXACT), tl.trans(k), input_precision=PREC)
        a, sigmoid = silu(z)
        slope = sigmoid + a * (1.0 - sigmoid)
        w2_now = w2 + load(init2 + at2, ok, EXACT)
        answer = tl.dot(tl.trans(a), w2_now, input_precision=PREC)
        square = a * a
        stretch = tl.sum(w2_now * w2_now) * LAYERED
        total_w = tl.sum(square * to_w[None, :]) + stretch * keys_w
        total_s = tl.sum(square * reach[None, :]) + stretch * keys_s
        e = (x - answer) * (1.0 / bound_of(total_w, total_s))
        back = tl.dot(w2_now, tl.trans(e), input_precision=PREC)
        if SAVE:
            tl.store(e_all + spot * (BC * BD) + i[:, None] * BD + dd[None, :], e)
            tl.store(z_all + spot * (BH * BC) + hidden, z)
            tl.store(back_all + spot * (BH * BC) + hidden, back)
            _store_stats(stats + spot * 5, total_w, total_s, stretch, keys_w, keys_s)
        back = back * slope
        s1 = load(s1_out + state + at1, ok, EXACT)
        if SAVE:
            store(s1_all + spot * (D * H) + at1, s1, ok, EXACT)
        w1 = tl.dot(back, k * to_w[:, None], acc=decay * w1 + carry * s1, input_precision=PREC)
        s1 = tl.dot(back, k * to_s[:, None], acc=persist * s1, input_precision=PREC)
        store(s1_out + state + at1, s1, ok, EXACT)
        s2 = load(s2_out + state + at2, ok, EXACT)
        if SAVE:
            store(s2_all + spot * (D * H) + at2, s2, ok, EXACT)
        w2 = tl.dot(a, e * to_w[:, None], acc=decay * w2 + carry * s2, input_precision=PREC)
        s2 = tl.dot(a, e * to_s[:, None], acc=persist * s2, input_precision=PREC)
        store(s2_out + state + at2, s2, ok, EXACT)
        tl.debug_barrier()  # the next chunk's loads may be distributed among the threads differently

    store(w1_out + state + at1, w1, ok, EXACT)
    store(w2_out + state + at2, w2, ok, EXACT)


@triton.jit
def _store_stats(at, total_w, total_s, stretch, keys_w, keys_s):
    tl.store(at, total_w)
    tl.store(at + 1, total_s)
    tl.store(at + 2, stretch)
    tl.store(at + 3, keys_w)
    tl.store(at + 4, keys_s)


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_POINTERS)
def two_layers_by_blocks(
    init1, init2, w1_in, w2_in, s1_in, s2_in, w1_out, w2_out, s1_out, s2_out,
    w1_all, w2_all, s1_all, s2_all, e_all, z_all, back_all, stats, scratch,
    keys, values, valid, offsets, tokens, whole, k_t, k_h, x_t, x_h, v_t, masked, N, SLOTS, HEADS, C,
    D: tl.constexpr, H: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, NB: tl.constexpr,
    SAVE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One program per row and head, with `NB` blocks of hidden units; the state is in L2. z and the errors
    go there between the two passes over the blocks: the first computes the answers, the second the step."""
    EXACT: tl.constexpr = (BD == D) and (BH * NB == H)
    ALL: tl.constexpr = NB * BH * BC
    n = tl.program_id(0).to(tl.int64)
    row = n // HEADS
    head = n % HEADS
    start, end, chunks, slot = sizes_of_row(offsets, row, C)
    i = tl.arange(0, BC)
    dd = tl.arange(0, BD)
    h0 = tl.arange(0, BH)
    inner = i[:, None] * BD + dd[None, :]
    init1 += head * (D * H)
    init2 += head * (D * H)
    keys += head * k_h
    values += head * x_h
    state = n * (D * H)
    for j in range(NB):
        hh = j * BH + h0
        at1 = hh[:, None] + dd[None, :] * H
        at2 = hh[:, None] * D + dd[None, :]
        ok = (hh < H)[:, None] & (dd < D)[None, :]
        store(w1_out + state + at1, load(w1_in + state + at1, ok, EXACT), ok, EXACT)
        store(w2_out + state + at2, load(w2_in + state + at2, ok, EXACT), ok, EXACT)
        store(s1_out + state + at1, load(s1_in + state + at1, ok, EXACT), ok, EXACT)
        store(s2_out + state + at2, load(s2_in + state + at2, ok, EXACT), ok, EXACT)
    tl.debug_barrier()

    for chunk in range(chunks):
        t = start + chunk * C + i
        here = (i < C) & (t < end)
        live = is_live(valid, t, v_t, masked, here)
        k = load_vectors(keys, t, live, dd, k_t, D, BD)
        to_w, to_s, reach = token_scalars(tokens, t, here, head, N, HEADS)
        decay, carry, persist = chunk_numbers(whole, slot + chunk, head, SLOTS, HEADS)
        spot = (slot + chunk) * HEADS + head
        z_at = z_all + spot * ALL if SAVE else scratch + n * (ALL + BC * BD)
        e_at = e_all + spot * (BC * BD) if SAVE else scratch + n * (ALL + BC * BD) + ALL
        answer = tl.zeros((BC, BD), tl.float32)
        total_w = 0.0
        total_s = 0.0
        stretch = 0.0
        for j in range(NB):
            hh = j * BH + h0
            at1 = hh[:, None] + dd[None, :] * H
            at2 = hh[:, None] * D + dd[None, :]
            ok = (hh < H)[:, None] & (dd < D)[None, :]
            w_now = load(w1_out + state + at1, ok, EXACT) + load(init1 + at1, ok, EXACT)
            z = tl.dot(w_now, tl.trans(k), input_precision=PREC)
            tl.store(z_at + hh[:, None] * BC + i[None, :], z)
            a, sigmoid = silu(z)
            w_now = load(w2_out + state + at2, ok, EXACT) + load(init2 + at2, ok, EXACT)
            answer = tl.dot(tl.trans(a), w_now, acc=answer, input_precision=PREC)
            square = a * a
            stretch += tl.sum(w_now * w_now)
            total_w += tl.sum(square * to_w[None, :])
            total_s += tl.sum(square * reach[None, :])
        k_square = tl.sum(k * k, 1)
        keys_w = tl.sum(k_square * to_w, 0)
        keys_s = tl.sum(k_square * reach, 0)
        stretch = stretch * LAYERED
        total_w += stretch * keys_w
        total_s += stretch * keys_s
        x = load_vectors(values, t, live, dd, x_t, D, BD)
        e = (x - answer) * (1.0 / bound_of(total_w, total_s))
        tl.store(e_at + inner, e)
        if SAVE:
            _store_stats(stats + spot * 5, total_w, total_s, stretch, keys_w, keys_s)
        tl.debug_barrier()

        for j in range(NB):
            hh = j * BH + h0
            at1 = hh[:, None] + dd[None, :] * H
            at2 = hh[:, None] * D + dd[None, :]
            ok = (hh < H)[:, None] & (dd < D)[None, :]
            hidden = hh[:, None] * BC + i[None, :]
            # Loaded per block: the compiler would keep each product's copy of e and k in shared memory for all blocks.
            e_j = tl.load(e_at + inner)
            k_j = load_vectors(keys, t, live, dd, k_t, D, BD)
            w2 = load(w2_out + state + at2, ok, EXACT)
            back = tl.dot(w2 + load(init2 + at2, ok, EXACT), tl.trans(e_j), input_precision=PREC)
            if SAVE:
                tl.store(back_all + spot * ALL + hidden, back)
            a, sigmoid = silu(tl.load(z_at + hidden))
            back = back * (sigmoid + a * (1.0 - sigmoid))
            s2 = load(s2_out + state + at2, ok, EXACT)
            if SAVE:
                store(w2_all + spot * (D * H) + at2, w2, ok, EXACT)
                store(s2_all + spot * (D * H) + at2, s2, ok, EXACT)
            w2 = tl.dot(a, e_j * to_w[:, None], acc=decay * w2 + carry * s2, input_precision=PREC)
            s2 = tl.dot(a, e_j * to_s[:, None], acc=persist * s2, input_precision=PREC)
            w1 = load(w1_out + state + at1, ok, EXACT)
            s1 = load(s1_out + state + at1, ok, EXACT)
            if SAVE:
                store(w1_all + spot * (D * H) + at1, w1, ok, EXACT)
                store(s1_all + spot * (D * H) + at1, s1, ok, EXACT)
            w1 = tl.dot(back, k_j * to_w[:, None], acc=decay * w1 + carry * s1, input_precision=PREC)
            s1 = tl.dot(back, k_j * to_s[:, None], acc=persist * s1, input_precision=PREC)
            tl.debug_barrier()  # all threads have read before any writes
            store(w2_out + state + at2, w2, ok, EXACT)
            store(s2_out + state + at2, s2, ok, EXACT)
            store(w1_out + state + at1, w1, ok, EXACT)
            store(s1_out + state + at1, s1, ok, EXACT)
        tl.debug_barrier()
