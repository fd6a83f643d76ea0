"""The derivative of a whole write, in one launch: one program per row and head goes through its chunks, last first.

The equations are those of `mal_adapter.memory.chunk`. As in `mal_adapter.memory.fused.write_kernels`, the hidden
dimension comes first. The derivatives with respect to W, S and the initial weights are in L2, and grow in place.

- `one_layer_backward`: depth 1; blocks of output columns are divided among programs. Everything that the derivative
  sums over columns is linear in them, so each program writes its part, and the parts are added up afterwards.
- `two_layers_backward`: depth 2; a program goes over blocks of hidden units, twice per chunk.
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
from mal_adapter.memory.fused.write_kernels import ONE_BLOCK, Saved, chunk_numbers, column_block, token_scalars

__all__ = ["WriteGradients", "one_layer_backward", "two_layers_backward", "write_chunks_backward"]

_PLAIN = ["k_t", "k_h", "v_t", "masked", "N", "SLOTS", "HEADS", "C"]
_POINTERS = ["keys", "valid", "offsets", "tokens", "whole"]


class WriteGradients(NamedTuple):
    """The derivative with respect to the arguments of `write_chunks`."""

    initial: list[torch.Tensor]
    weights: list[torch.Tensor]
    momentum: list[torch.Tensor]
    keys: torch.Tensor
    values: torch.Tensor
    tokens: torch.Tensor
    whole: torch.Tensor


def write_chunks_backward(
    initial: list[torch.Tensor],
    saved: Saved,
    keys: torch.Tensor,
    tokens: torch.Tensor,
    whole: torch.Tensor,
    offsets: torch.Tensor,
    valid: torch.Tensor | None,
    chunk_size: int,
    precision: str,
    d_weights: list[torch.Tensor],
    d_momentum: list[torch.Tensor],
) -> WriteGradients:
    """The derivative of `write_chunks`.

    Args:
        initial: Learned initial weights.
        saved: What the write has kept.
        keys: As given to the write; so are tokens, whole, offsets, valid, chunk_size and precision.
        tokens: See there.
        whole: See there.
        offsets: See there.
        valid: See there.
        chunk_size: See there.
        precision: See there.
        d_weights: With respect to the write's results.
        d_momentum: With respect to the write's results.
    """
    initial, d_weights, d_momentum = ([aligned(t) for t in layers] for layers in (initial, d_weights, d_momentum))
    keys = keys if keys.stride(-1) == 1 else keys.contiguous()
    count, heads, d = keys.shape
    rows, slots = len(offsets) - 1, whole.shape[2]
    h = initial[0].shape[-1]
    two = len(initial) == 2
    bc, bd = padded(chunk_size), padded(d)
    block = min(column_block(d, h, chunk_size), 64) if two else (bd if bd <= 64 else 32)
    parts = 1 if two else bd // block
    to_weights, to_momentum, to_initial = ([torch.empty_like(t) for t in d_weights] for _ in range(3))
    per_part = [
        torch.empty(parts, *shape, device=keys.device, dtype=torch.float32)
        for shape in ((count, heads, d), tokens.shape, whole.shape)
    ]
    d_values = torch.empty(count, heads, d, device=keys.device, dtype=torch.float32)
    state = (*d_weights, *d_momentum, *to_weights, *to_momentum, *to_initial)
    mask, *masked = mask_arguments(valid, offsets)
    inputs = (keys, mask, offsets, tokens, whole)
    numbers = (*keys.stride()[:2], *masked, count, slots, heads, chunk_size)
    common = {"D": d, "BC": bc, "BD": bd, "PREC": precision, **OPTIONS}
    kept = (*saved.weights, *saved.momentum, saved.errors)
    if two:
        blocks = triton.cdiv(h, block)
        scratch = torch.empty(rows * heads, (3 * blocks * block + bd) * bc, device=keys.device, dtype=torch.float32)
        two_layers_backward[(rows * heads,)](
            *initial, *kept, *saved.hidden, saved.stats, *state, d_values, *per_part, scratch, *inputs, *numbers,
            **common, H=h, BH=block, NB=blocks, ROOM=saved.hidden.shape[3], num_warps=4 if bc * bd <= ONE_BLOCK else 8,
        )  # fmt: skip
    else:
        one_layer_backward[(rows * heads * parts,)](
            *initial, *kept, *state, d_values, *per_part, *inputs, *numbers, **common, BO=block, num_warps=4
        )
    d_keys, d_tokens, d_whole = (t[0] if parts == 1 else t.sum(0) for t in per_part)
    d_initial = [t[0] if rows == 1 else t.sum(0) for t in to_initial]
    return WriteGradients(d_initial, to_weights, to_momentum, d_keys, d_values, d_tokens, d_whole)


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_POINTERS)
def one_layer_backward(
    init, w_all, s_all, e_all, g_w, g_s, d_w, d_s, d_init, d_values, d_keys, d_tokens, d_whole,
    keys, valid, offsets, tokens, whole, k_t, k_h, v_t, masked, N, SLOTS, HEADS, C,
    D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BO: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """One program per row, head and block of output columns."""
    G: tl.constexpr = BD // BO
    EXACT: tl.constexpr = BD == D
    n = tl.program_id(0).to(tl.int64) // G
    g = tl.program_id(0).to(tl.int64) % G
    row = n // HEADS
    head = n % HEADS
    start, end, chunks, slot = sizes_of_row(offsets, row, C)
    i = tl.arange(0, BC)
    dd = tl.arange(0, BD)
    oo = g.to(tl.int32) * BO + tl.arange(0, BO)
    at_w = dd[:, None] * D + oo[None, :]
    ok_w = (dd < D)[:, None] & (oo < D)[None, :]
    width = (n * 0 + HEADS) * D
    token_layer = (n * 0 + HEADS) * N
    slot_layer = (n * 0 + HEADS) * SLOTS
    keys += head * k_h
    d_keys += g * N * width + head * D
    d_values += head * D
    d_tokens += g * 3 * token_layer + head * N
    d_whole += g * 3 * slot_layer + head * SLOTS
    w0 = load(init + head * (D * D) + at_w, ok_w, EXACT)
    dw = load(g_w + n * (D * D) + at_w, ok_w, EXACT)
    ds = load(g_s + n * (D * D) + at_w, ok_w, EXACT)
    di = tl.zeros((BD, BO), tl.float32)
    for step in range(chunks):
        chunk = chunks - 1 - step
        t = start + chunk * C + i
        here = (i < C) & (t < end)
        live = is_live(valid, t, v_t, masked, here)
        k = load_vectors(keys, t, live, dd, k_t, D, BD)
        to_w, to_s, reach = token_scalars(tokens, t, here, head, N, HEADS)
        decay, carry, persist = chunk_numbers(whole, slot + chunk, head, SLOTS, HEADS)
        spot = (slot + chunk) * HEADS + head
        e = tl.load(e_all + spot * (BC * BD) + i[:, None] * BD + oo[None, :])

        # W' = decay W + carry S + kᵀ (to_w e), S' = persist S + kᵀ (to_s e)
        q = tl.dot(k, dw, input_precision=PREC)
        g_to_w = tl.sum(e * q, 1)
        d_e = q * to_w[:, None]
        q = tl.dot(k, ds, input_precision=PREC)
        g_to_s = tl.sum(e * q, 1)
        d_e += q * to_s[:, None]
        dk = tl.dot(e * to_w[:, None], tl.trans(dw), input_precision=PREC)
        dk = tl.dot(e * to_s[:, None], tl.trans(ds), acc=dk, input_precision=PREC)
        w = load(w_all + spot * (D * D) + at_w, ok_w, EXACT)
        s = load(s_all + spot * (D * D) + at_w, ok_w, EXACT)
        at = d_whole + slot + chunk
        tl.store(at, tl.sum(dw * w))
        tl.store(at + slot_layer, tl.sum(dw * s))
        tl.store(at + 2 * slot_layer, tl.sum(ds * s))

        # e = (v − k W) / bound
        k_square = tl.sum(k * k, 1)
        total_w = tl.sum(k_square * to_w, 0)
        total_s = tl.sum(k_square * reach, 0)
        bound = bound_of(total_w, total_s)
        minus = d_e * (-1.0 / bound)
        d_bound = tl.sum(minus * e)
        b_w = tl.where((total_w == bound) & (bound > 1.0), d_bound, 0.0)
        b_s = tl.where((total_s == bound) & (bound > 1.0), d_bound, 0.0)
        dk = tl.dot(minus, tl.trans(w + w0), acc=dk, input_precision=PREC)
        dk += k * (2.0 * (to_w * b_w + reach * b_s))[:, None]
        at_t = t[:, None] * width
        tl.store(
            d_values + at_t + oo[None, :], tl.where(live[:, None], -minus, 0.0), mask=here[:, None] & (oo < D)[None, :]
        )
        tl.store(d_keys + at_t + dd[None, :], tl.where(live[:, None], dk, 0.0), mask=here[:, None] & (dd < D)[None, :])
        at = d_tokens + t
        tl.store(at, g_to_w + b_w * k_square, mask=here)
        tl.store(at + token_layer, g_to_s, mask=here)
        tl.store(at + 2 * token_layer, b_s * k_square, mask=here)
        d_now = tl.dot(tl.trans(k), minus, input_precision=PREC)
        ds = carry * dw + persist * ds
        dw = decay * dw + d_now
        di += d_now
    store(d_w + n * (D * D) + at_w, dw, ok_w, EXACT)
    store(d_s + n * (D * D) + at_w, ds, ok_w, EXACT)
    store(d_init + n * (D * D) + at_w, di, ok_w, EXACT)


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_POINTERS)
def two_layers_backward(
    init1, init2, w1_all, w2_all, s1_all, s2_all, e_all, z_all, back_all, stats,
    g_w1, g_w2, g_s1, g_s2, d_w1, d_w2, d_s1, d_s2, d_i1, d_i2, d_values, d_keys, d_tokens, d_whole, scratch,
    keys, valid, offsets, tokens, whole, k_t, k_h, v_t, masked, N, SLOTS, HEADS, C,
    D: tl.constexpr, H: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, NB: tl.constexpr,
    ROOM: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One program per row and head. `scratch` holds d_back, d_z, d_a and −d_values between the two passes over the
    blocks: the first computes the derivative with respect to the errors and the bound, the second needs both. `ROOM` is
    how many hidden units the write has kept, in blocks of another size."""
    EXACT: tl.constexpr = (BD == D) and (NB * BH == H)
    ALL: tl.constexpr = NB * BH * BC
    KEPT: tl.constexpr = ROOM * BC
    n = tl.program_id(0).to(tl.int64)
    row = n // HEADS
    head = n % HEADS
    start, end, chunks, slot = sizes_of_row(offsets, row, C)
    i = tl.arange(0, BC)
    dd = tl.arange(0, BD)
    h0 = tl.arange(0, BH)
    inner = i[:, None] * BD + dd[None, :]
    state = n * (D * H)
    width = (n * 0 + HEADS) * D
    token_layer = (n * 0 + HEADS) * N
    slot_layer = (n * 0 + HEADS) * SLOTS
    init1 += head * (D * H)
    init2 += head * (D * H)
    keys += head * k_h
    d_keys += head * D
    d_values += head * D
    d_tokens += head * N
    d_whole += head * SLOTS
    d_w1 += state
    d_w2 += state
    d_s1 += state
    d_s2 += state
    d_i1 += state
    d_i2 += state
    scratch += n * (3 * ALL + BC * BD)

    for j in range(NB):
        hh = j * BH + h0
        at1 = hh[:, None] + dd[None, :] * H
        at2 = hh[:, None] * D + dd[None, :]
        ok = (hh < H)[:, None] & (dd < D)[None, :]
        store(d_w1 + at1, load(g_w1 + state + at1, ok, EXACT), ok, EXACT)
        store(d_w2 + at2, load(g_w2 + state + at2, ok, EXACT), ok, EXACT)
        store(d_s1 + at1, load(g_s1 + state + at1, ok, EXACT), ok, EXACT)
        store(d_s2 + at2, load(g_s2 + state + at2, ok, EXACT), ok, EXACT)
        store(d_i1 + at1, tl.zeros((BH, BD), tl.float32), ok, EXACT)
        store(d_i2 + at2, tl.zeros((BH, BD), tl.float32), ok, EXACT)
    tl.debug_barrier()

    for step in range(chunks):
        chunk = chunks - 1 - step
        t = start + chunk * C + i
        here = (i < C) & (t < end)
        live = is_live(valid, t, v_t, masked, here)
        to_w, to_s, reach = token_scalars(tokens, t, here, head, N, HEADS)
        decay, carry, persist = chunk_numbers(whole, slot + chunk, head, SLOTS, HEADS)
        spot = (slot + chunk) * HEADS + head
        now = spot * (D * H)
        e_at = e_all + spot * (BC * BD) + inner

        dk = tl.zeros((BC, BD), tl.float32)
        d_e = tl.zeros((BC, BD), tl.float32)
        g_to_w = tl.zeros((BC,), tl.float32)
        g_to_s = tl.zeros((BC,), tl.float32)
        square = tl.zeros((BC,), tl.float32)
        g_decay = 0.0
        g_carry = 0.0
        g_persist = 0.0
        for j in range(NB):
            hh = j * BH + h0
            at1 = hh[:, None] + dd[None, :] * H
            at2 = hh[:, None] * D + dd[None, :]
            hidden = hh[:, None] * BC + i[None, :]
            ok = (hh < H)[:, None] & (dd < D)[None, :]
            # Loaded per block: the compiler would keep each product's copy of e and k in shared memory for all blocks.
            e = tl.load(e_at)
            k = load_vectors(keys, t, live, dd, k_t, D, BD)
            # W1' = decay W1 + carry S1 + (back slope) (to_w k), S1' = persist S1 + (back slope) (to_s k)
            z = tl.load(z_all + spot * KEPT + hidden)
            back = tl.load(back_all + spot * KEPT + hidden)
            a, sigmoid = silu(z)
            slope = sigmoid + a * (1.0 - sigmoid)
            he = back * slope
            dw = load(d_w1 + at1, ok, EXACT)
            ds = load(d_s1 + at1, ok, EXACT)
            dk = tl.dot(tl.trans(he * to_w[None, :]), dw, acc=dk, input_precision=PREC)
            dk = tl.dot(tl.trans(he * to_s[None, :]), ds, acc=dk, input_precision=PREC)
            q = tl.dot(dw, tl.trans(k), input_precision=PREC)
            g_to_w += tl.sum(he * q, 0)
            d_he = q * to_w[None, :]
            q = tl.dot(ds, tl.trans(k), input_precision=PREC)
            g_to_s += tl.sum(he * q, 0)
            d_he += q * to_s[None, :]
            d_back = d_he * slope
            tl.store(scratch + hidden, d_back)
            tl.store(scratch + ALL + hidden, d_he * back * (sigmoid * (1.0 - sigmoid) * (2.0 + z - 2.0 * a)))
            tl.debug_barrier()
            # Loaded once more instead of held in registers across the products.
            dw = load(d_w1 + at1, ok, EXACT)
            ds = load(d_s1 + at1, ok, EXACT)
            w = load(w1_all + now + at1, ok, EXACT)
            s = load(s1_all + now + at1, ok, EXACT)
            g_decay += tl.sum(dw * w)
            g_carry += tl.sum(dw * s)
            g_persist += tl.sum(ds * s)
            tl.debug_barrier()
            store(d_s1 + at1, carry * dw + persist * ds, ok, EXACT)
            # W2' = decay W2 + carry S2 + a (to_w e), S2' = persist S2 + a (to_s e), back = W2 e
            w = load(w2_all + now + at2, ok, EXACT)
            d_e = tl.dot(tl.trans(d_back), w + load(init2 + at2, ok, EXACT), acc=d_e, input_precision=PREC)
            dw = load(d_w2 + at2, ok, EXACT)
            ds = load(d_s2 + at2, ok, EXACT)
            d_e = tl.dot(tl.trans(a * to_w[None, :]), dw, acc=d_e, input_precision=PREC)
            d_e = tl.dot(tl.trans(a * to_s[None, :]), ds, acc=d_e, input_precision=PREC)
            q = tl.dot(dw, tl.trans(e), input_precision=PREC)
            g_to_w += tl.sum(a * q, 0)
            d_a = q * to_w[None, :]
            q = tl.dot(ds, tl.trans(e), input_precision=PREC)
            g_to_s += tl.sum(a * q, 0)
            d_a += q * to_s[None, :]
            square += tl.sum(a * a, 0)
            tl.store(scratch + 2 * ALL + hidden, d_a)
            tl.debug_barrier()
            dw = load(d_w2 + at2, ok, EXACT)
            ds = load(d_s2 + at2, ok, EXACT)
            w = load(w2_all + now + at2, ok, EXACT)
            s = load(s2_all + now + at2, ok, EXACT)
            g_decay += tl.sum(dw * w)
            g_carry += tl.sum(dw * s)
            g_persist += tl.sum(ds * s)
            tl.debug_barrier()
            store(d_s2 + at2, carry * dw + persist * ds, ok, EXACT)

        # e = (v − a W2) / bound, bound = max(totals, 1)
        total_w = tl.load(stats + spot * 5)
        total_s = tl.load(stats + spot * 5 + 1)
        stretch = tl.load(stats + spot * 5 + 2)
        keys_w = tl.load(stats + spot * 5 + 3)
        keys_s = tl.load(stats + spot * 5 + 4)
        bound = bound_of(total_w, total_s)
        minus = d_e * (-1.0 / bound)
        tl.store(scratch + 3 * ALL + inner, minus)
        d_bound = tl.sum(minus * tl.load(e_at))
        g_w = tl.where((total_w == bound) & (bound > 1.0), d_bound, 0.0)
        g_s = tl.where((total_s == bound) & (bound > 1.0), d_bound, 0.0)
        ok_t = here[:, None] & (dd < D)[None, :]
        at_t = t[:, None] * width + dd[None, :]
        tl.store(d_values + at_t, tl.where(live[:, None], -minus, 0.0), mask=ok_t)
        per_token = to_w * g_w + reach * g_s
        k = load_vectors(keys, t, live, dd, k_t, D, BD)
        square += stretch * tl.sum(k * k, 1)
        tl.store(d_tokens + t, g_to_w + g_w * square, mask=here)
        tl.store(d_tokens + token_layer + t, g_to_s, mask=here)
        tl.store(d_tokens + 2 * token_layer + t, g_s * square, mask=here)
        at = d_whole + slot + chunk
        tl.store(at, g_decay)
        tl.store(at + slot_layer, g_carry)
        tl.store(at + 2 * slot_layer, g_persist)
        by_stretch = 2.0 * LAYERED * (g_w * keys_w + g_s * keys_s)
        dk += k * (2.0 * stretch * per_token)[:, None]
        tl.debug_barrier()

        for j in range(NB):
            hh = j * BH + h0
            at1 = hh[:, None] + dd[None, :] * H
            at2 = hh[:, None] * D + dd[None, :]
            hidden = hh[:, None] * BC + i[None, :]
            ok = (hh < H)[:, None] & (dd < D)[None, :]
            a, sigmoid = silu(tl.load(z_all + spot * KEPT + hidden))
            e_j = tl.load(e_at)
            minus_j = tl.load(scratch + 3 * ALL + inner)
            k_j = load_vectors(keys, t, live, dd, k_t, D, BD)
            w_now = load(w2_all + now + at2, ok, EXACT) + load(init2 + at2, ok, EXACT)
            d_now = tl.dot(tl.load(scratch + hidden), e_j, acc=w_now * by_stretch, input_precision=PREC)
            d_now = tl.dot(a, minus_j, acc=d_now, input_precision=PREC)
            dw = load(d_w2 + at2, ok, EXACT)
            di = load(d_i2 + at2, ok, EXACT)
            tl.debug_barrier()
            store(d_w2 + at2, decay * dw + d_now, ok, EXACT)
            store(d_i2 + at2, di + d_now, ok, EXACT)
            d_a = tl.load(scratch + 2 * ALL + hidden) + a * (2.0 * per_token)[None, :]
            d_a = tl.dot(w_now, tl.trans(minus_j), acc=d_a, input_precision=PREC)
            # a = SiLU(z), z = W1 k
            d_z = tl.load(scratch + ALL + hidden) + d_a * (sigmoid + a * (1.0 - sigmoid))
            w_now = load(w1_all + now + at1, ok, EXACT) + load(init1 + at1, ok, EXACT)
            dk = tl.dot(tl.trans(d_z), w_now, acc=dk, input_precision=PREC)
            d_now = tl.dot(d_z, k_j, input_precision=PREC)
            dw = load(d_w1 + at1, ok, EXACT)
            di = load(d_i1 + at1, ok, EXACT)
            tl.debug_barrier()
            store(d_w1 + at1, decay * dw + d_now, ok, EXACT)
            store(d_i1 + at1, di + d_now, ok, EXACT)
        tl.store(d_keys + at_t, tl.where(live[:, None], dk, 0.0), mask=ok_t)
        tl.debug_barrier()
