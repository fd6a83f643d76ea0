"""The products of the gates of all chunks in one launch, and their derivative in another one.

They are the fields of `mal_adapter.memory.gates.ChunkScalars`. Nothing is subtracted here: everything is a product, or
a sum of positive terms, so float64 keeps its digits without logarithms.

    p_t = Π_{j>t} η_j and a_t = Π_{j>t} (1 − α_j)                     products from the last token on
    c_t = m_t a_t + η_{t+1} c_{t+1}                                   a recurrence from the last token on
    q p_t − P c_t = p_t Σ_{j<t} m_j a_j Π_{i≤j} η_i                   running sums
    1 − P = Σ_t (1 − η_t) Π_{j<t} η_j
"""

import torch
import triton
import triton.language as tl

from mal_adapter.memory.fused.parts import OPTIONS, count_slots, is_live, mask_arguments, padded, sizes_of_row
from mal_adapter.memory.gates import MAX_LOGIT

__all__ = ["backward_kernel", "chunk_scalars", "chunk_scalars_backward", "forward_kernel"]

_TINY = tl.constexpr(2.2250738585072014e-308)
_MAX_LOGIT = tl.constexpr(MAX_LOGIT)

_PLAIN = ["s_t", "s_h", "m_t", "m_h", "f_t", "f_h", "v_t", "masked", "N", "SLOTS", "HEADS", "C", "CHUNKS"]
_POINTERS = ["step", "momentum", "forget", "offsets", "valid", "tokens", "whole"]


def chunk_scalars(
    step: torch.Tensor,
    momentum: torch.Tensor,
    forget: torch.Tensor,
    offsets: torch.Tensor,
    valid: torch.Tensor | None,
    chunk_size: int,
    longest: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scalars of all chunks.

    Args:
        step: Logits of θ, (tokens, heads); also those of η and α.
        momentum: Logits of η.
        forget: Logits of α.
        offsets: Where rows begin and the last one ends, (rows + 1) int32.
        valid: (tokens,) bool; at a False token θ = 0, η = 1, α = 0.
        chunk_size: Tokens per chunk.
        longest: Tokens of the longest row.

    Returns:
        θ_t c_t, θ_t p_t and θ_t (q p_t − P c_t) / (1 − P), (3, heads, tokens); decay, carry and persist,
        (3, heads, slots); float32.
    """
    count, heads = step.shape
    rows, chunks = len(offsets) - 1, triton.cdiv(longest, chunk_size)
    slots = count_slots(count, rows, chunk_size)
    tokens = torch.empty(3, heads, count, device=step.device, dtype=torch.float32)
    whole = torch.empty(3, heads, slots, device=step.device, dtype=torch.float32)
    mask, *masked = mask_arguments(valid, offsets)
    forward_kernel[(rows * heads * chunks,)](
        *(step, momentum, forget, offsets, mask, tokens, whole),
        *(*step.stride(), *momentum.stride(), *forget.stride(), *masked),
        *(count, slots, heads, chunk_size, chunks),
        BC=padded(chunk_size),
        num_warps=2,
        **OPTIONS,
    )
    return tokens, whole


def chunk_scalars_backward(
    step: torch.Tensor,
    momentum: torch.Tensor,
    forget: torch.Tensor,
    offsets: torch.Tensor,
    valid: torch.Tensor | None,
    chunk_size: int,
    longest: int,
    d_tokens: torch.Tensor,
    d_whole: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The derivative with respect to the three gates' logits, each (tokens, heads) in the logits' dtype.

    Args:
        step, momentum, forget, offsets, valid, chunk_size, longest: As of `chunk_scalars`.
        d_tokens: With respect to its first result.
        d_whole: With respect to its second result.
    """
    count, heads = step.shape
    rows, chunks = len(offsets) - 1, triton.cdiv(longest, chunk_size)
    mask, *masked = mask_arguments(valid, offsets)
    d_step, d_momentum, d_forget = (
        torch.empty(count, heads, device=step.device, dtype=g.dtype) for g in (step, momentum, forget)
    )
    backward_kernel[(rows * heads * chunks,)](
        *(step, momentum, forget, offsets, mask, d_tokens, d_whole, d_step, d_momentum, d_forget),
        *(*step.stride(), *momentum.stride(), *forget.stride(), *masked),
        *(count, d_whole.shape[2], heads, chunk_size, chunks),
        BC=padded(chunk_size),
        num_warps=2,
        **OPTIONS,
    )
    return d_step, d_momentum, d_forget


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def _compose(a1, b1, a2, b2):
    """First x → a1 x + b1, then x → a2 x + b2."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _gate(at, here, live, sign, neutral):
    """σ(sign · logit); `where` and not `minimum`, which would turn NaN into a number."""
    x = tl.load(at, mask=here, other=0.0).to(tl.float64) * sign
    x = tl.where(x > _MAX_LOGIT, _MAX_LOGIT, x)
    x = tl.where(x < -_MAX_LOGIT, -_MAX_LOGIT, x)
    return tl.where(live, 1.0 / (1.0 + tl.exp(-x)), neutral)


@triton.jit
def _neighbours(valid, t, end, i, v_t, masked, C):
    """Which tokens of a chunk exist and are valid, and the same of the tokens before them, within the chunk."""
    here = (i < C) & (t < end)
    before = (i > 0) & (i < C) & (t <= end)
    return here, is_live(valid, t, v_t, masked, here), before, is_live(valid, t - 1, v_t, masked, before)


@triton.jit
def _products(momentum, forget, valid, t, end, i, m_t, f_t, v_t, masked, C):
    """p, a, Π_{j<t} η_j, c, Σ_{j<t} m_j a_j Π_{i≤j} η_i and 1 − P of a chunk. Gates of neighbours are loaded once more,
    one token later or earlier, because a shift within a block would go through shared memory anyway."""
    here, live, before, live_before = _neighbours(valid, t, end, i, v_t, masked, C)
    later = (i + 1 < C) & (t + 1 < end)
    live_later = is_live(valid, t + 1, v_t, masked, later)
    eta_later = _gate(momentum + (t + 1) * m_t, later, live_later, 1.0, 1.0)
    eta_before = _gate(momentum + (t - 1) * m_t, before, live_before, 1.0, 1.0)
    friction = _gate(momentum + t * m_t, here, live, -1.0, 0.0)
    keep = _gate(forget + t * f_t, here, live, -1.0, 1.0)
    keep_later = _gate(forget + (t + 1) * f_t, later, live_later, -1.0, 1.0)
    p = tl.associative_scan(eta_later, 0, _multiply, reverse=True)
    a = tl.associative_scan(keep_later, 0, _multiply, reverse=True)
    until_before = tl.associative_scan(eta_before, 0, _multiply)
    _, c = tl.associative_scan((eta_later, tl.where(live, a, 0.0)), 0, _compose, reverse=True)
    # a_{t−1} = (1 − α_t) a_t
    earlier = tl.cumsum(tl.where(live_before, keep * a * until_before, 0.0), 0)
    return p, a, until_before, c, earlier, tl.maximum(tl.sum(friction * until_before, 0), _TINY)


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_POINTERS)
def forward_kernel(
    step, momentum, forget, offsets, valid, tokens, whole,
    s_t, s_h, m_t, m_h, f_t, f_h, v_t, masked, N, SLOTS, HEADS, C, CHUNKS,
    BC: tl.constexpr,
):  # fmt: skip
    """One program per row, head and chunk."""
    n = tl.program_id(0) // CHUNKS
    chunk = tl.program_id(0) % CHUNKS
    row = n // HEADS
    head = (n % HEADS).to(tl.int64)
    start, end, _, slot = sizes_of_row(offsets, row, C)
    i = tl.arange(0, BC)
    t = start + chunk * C + i
    momentum += head * m_h
    forget += head * f_h
    here, live, _, _ = _neighbours(valid, t, end, i, v_t, masked, C)
    theta = _gate(step + head * s_h + t * s_t, here, live, 1.0, 0.0)
    eta = _gate(momentum + t * m_t, here, live, 1.0, 1.0)
    keep = _gate(forget + t * f_t, here, live, -1.0, 1.0)
    p, a, _, c, earlier, friction = _products(momentum, forget, valid, t, end, i, m_t, f_t, v_t, masked, C)

    layer = (head * 0 + HEADS) * N  # in 64 bits
    at = tokens + head * N + t
    tl.store(at, (theta * c).to(tl.float32), mask=here)
    tl.store(at + layer, (theta * p).to(tl.float32), mask=here)
    tl.store(at + 2 * layer, (theta * (p * (earlier / friction))).to(tl.float32), mask=here)
    exists = start + chunk * C < end
    first = i == 0
    layer = (head * 0 + HEADS) * SLOTS
    at = whole + head * SLOTS + slot + chunk
    tl.store(at, tl.sum(tl.where(first, keep * a, 0.0), 0).to(tl.float32), mask=exists)
    tl.store(at + layer, tl.sum(tl.where(first, eta * c, 0.0), 0).to(tl.float32), mask=exists)
    tl.store(at + 2 * layer, tl.sum(tl.where(first, eta * p, 0.0), 0).to(tl.float32), mask=exists)


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=[*_POINTERS, "d_step", "d_momentum", "d_forget"])
def backward_kernel(
    step, momentum, forget, offsets, valid, tokens, whole, d_step, d_momentum, d_forget,
    s_t, s_h, m_t, m_h, f_t, f_h, v_t, masked, N, SLOTS, HEADS, C, CHUNKS,
    BC: tl.constexpr,
):  # fmt: skip
    """`tokens` and `whole` are derivatives here. A product is differentiated by its logarithm: value times derivative,
    summed up; c and q p − P c by the same recurrences the other way round."""
    n = tl.program_id(0) // CHUNKS
    chunk = tl.program_id(0) % CHUNKS
    row = n // HEADS
    head = (n % HEADS).to(tl.int64)
    start, end, _, slot = sizes_of_row(offsets, row, C)
    i = tl.arange(0, BC)
    t = start + chunk * C + i
    step += head * s_h
    momentum += head * m_h
    forget += head * f_h
    here, live, before, live_before = _neighbours(valid, t, end, i, v_t, masked, C)
    theta = _gate(step + t * s_t, here, live, 1.0, 0.0)
    theta_before = _gate(step + (t - 1) * s_t, before, live_before, 1.0, 0.0)
    eta = _gate(momentum + t * m_t, here, live, 1.0, 1.0)
    eta_before = _gate(momentum + (t - 1) * m_t, before, live_before, 1.0, 1.0)
    keep = _gate(forget + t * f_t, here, live, -1.0, 1.0)
    p, a, until_before, c, earlier, friction = _products(momentum, forget, valid, t, end, i, m_t, f_t, v_t, masked, C)

    layer = (head * 0 + HEADS) * N
    at = tokens + head * N + t
    g_c = tl.load(at, mask=here, other=0.0).to(tl.float64) * theta
    g_before = tl.load(at - 1, mask=before, other=0.0).to(tl.float64) * theta_before
    g_p = tl.load(at + layer, mask=here, other=0.0).to(tl.float64) * theta
    g_later = tl.load(at + 2 * layer, mask=here, other=0.0).to(tl.float64) * theta
    exists = start + chunk * C < end
    layer = (head * 0 + HEADS) * SLOTS
    at = whole + head * SLOTS + slot + chunk
    g_decay = tl.load(at, mask=exists, other=0.0).to(tl.float64)
    g_carry = tl.load(at + layer, mask=exists, other=0.0).to(tl.float64)
    g_persist = tl.load(at + 2 * layer, mask=exists, other=0.0).to(tl.float64)

    # c_t = m_t a_t + η_{t+1} c_{t+1} and q = η_1 c_1: with respect to c_{t−1}, at the first token to q; then to c_t
    first = i == 0
    _, to_before = tl.associative_scan(
        (tl.where(first, 1.0, eta_before), tl.where(first, g_carry, g_before)), 0, _compose
    )
    by_eta = eta * to_before
    to_c = g_c + by_eta
    later = g_later * (p * (earlier / friction))
    to_earlier = g_later * (p / friction)
    term = tl.where(live, a * (until_before * eta), 0.0) * (tl.cumsum(to_earlier, 0, reverse=True) - to_earlier)
    log_p = g_p * p + later
    log_a = tl.where(live, a, 0.0) * to_c + term
    persist = tl.sum(tl.where(first, eta * p, 0.0), 0)
    decay = tl.sum(tl.where(first, keep * a, 0.0), 0)
    by_friction = tl.where(friction > _TINY, tl.sum(later, 0) / friction, 0.0)
    log_eta = by_eta * c + (tl.cumsum(log_p, 0) - log_p) + tl.cumsum(term, 0, reverse=True)
    log_eta += persist * (g_persist + by_friction)
    log_keep = (tl.cumsum(log_a, 0) - log_a) + g_decay * decay
    log_theta = g_c * c + log_p

    at = t * HEADS + head
    _store_logit(d_step + at, step + t * s_t, here, live, log_theta, -1.0)
    _store_logit(d_momentum + at, momentum + t * m_t, here, live, log_eta, -1.0)
    _store_logit(d_forget + at, forget + t * f_t, here, live, -log_keep, 1.0)


@triton.jit
def _store_logit(at, logits, here, live, by_log, sign):
    """d log σ(x) / dx = σ(−x); zero where the logit was clamped."""
    x = tl.load(logits, mask=here, other=0.0).to(tl.float32)
    d = tl.where(live & ~(tl.abs(x) > _MAX_LOGIT), by_log * _gate(logits, here, live, sign, 0.0), 0.0)
    tl.store(at, d.to(tl.float32).to(at.dtype.element_ty), mask=here)
