"""What a write leaves behind: the new state of each row whose numbers are finite, the old one of each other row."""

import torch
from jaxtyping import Bool
from torch import Tensor

from mal_adapter.memory import fused
from mal_adapter.memory.rule import Weights
from mal_adapter.memory.spans import Spans
from mal_adapter.memory.state import MemoryState

__all__ = ["commit", "total"]


def commit(
    state: MemoryState,
    weights: Weights,
    momentum: Weights,
    spans: Spans,
    valid: Bool[Tensor, " tokens"] | None,
    finite: Bool[Tensor, " rows"] | None = None,
) -> MemoryState:
    """The state after one more utterance per row. A row that is not finite stays as it is and counts a skipped write.

    Args:
        state: Before; not changed.
        weights: After.
        momentum: After.
        spans: The rows of the utterance.
        valid: Its audio tokens; all if None.
        finite: Rows with False count as not finite, whatever their weights are.
    """
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling() or finite is not None
    if not plain and fused.takes_read(weights, weights[0]):  # where the memory itself is in kernels
        return _commit_in_kernels(state, weights, momentum, spans, valid)
    # NaN - NaN and inf - inf are NaN: the sum is finite unless a number is not, or the sum overflows.
    totals = torch.stack([total(layer, (1, 2, 3)) for layer in (*weights, *momentum)]).sum(0)
    known, finite = finite, totals - totals == 0
    finite = finite if known is None else finite & known
    failed = ~finite
    old = failed[:, None, None, None]
    all_tokens: int | Tensor = spans.longest if spans.equal else spans.counts
    tokens = all_tokens if valid is None else spans.pad(valid).sum(-1)
    attempted = tokens > 0

    def select(new: Weights, before: Weights) -> Weights:
        # The old tensor is the first argument, because torch.where takes over its memory layout.
        return tuple(torch.where(old, b, n) for n, b in zip(new, before, strict=True))

    return MemoryState(
        select(weights, state.weights),
        select(momentum, state.momentum),
        utterances=state.utterances + (attempted & finite),
        tokens=state.tokens + tokens * finite,
        skipped_writes=state.skipped_writes + (attempted & failed),
        fingerprint=state.fingerprint,
        answers=state.answers,
    )


def _commit_in_kernels(
    state: MemoryState, weights: Weights, momentum: Weights, spans: Spans, valid: Bool[Tensor, " tokens"] | None
) -> MemoryState:
    from mal_adapter.memory.fused.commit_kernels import keep_finite

    counters = (state.utterances, state.tokens, state.skipped_writes)
    old = (*state.weights, *state.momentum)
    new, counted = keep_finite((*weights, *momentum), old, counters, spans.offsets, valid)
    layers = len(weights)
    return MemoryState(new[:layers], new[layers:], *counted, state.fingerprint, state.answers)


def total(values: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """A sum over `dims`. It is finite unless a number is not or the sum overflows: one pass, no copy."""
    return values.detach().sum(dims, dtype=torch.promote_types(values.dtype, torch.float32))
