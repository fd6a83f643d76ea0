"""The kernels as operators of PyTorch, `mal_adapter::titans_write` and `mal_adapter::titans_read`: with a derivative,
and with shapes for tensors without data, so that a compiled host keeps its graph.

An operator knows neither whether a gradient is recorded nor what it will need. So `titans_write` has an argument for
it, and what it saves are further outputs. The setting of the products' accuracy is looked up when an operator runs,
because it is not a tensor, which a graph could hold.
"""

from typing import Any

import torch
from torch import Tensor

from mal_adapter.memory.fused.parts import count_slots
from mal_adapter.memory.fused.read_kernels import read_answers, read_answers_backward
from mal_adapter.memory.fused.scalars import chunk_scalars, chunk_scalars_backward
from mal_adapter.memory.fused.support import precision
from mal_adapter.memory.fused.write_backward import write_chunks_backward
from mal_adapter.memory.fused.write_kernels import Saved, write_chunks

__all__ = ["titans_read", "titans_read_backward", "titans_write", "titans_write_backward"]

_ROWS = "Tensor offsets, Tensor? valid, SymInt chunk_size, SymInt longest"
_GATES = "Tensor step, Tensor persist, Tensor forget"


@torch.library.custom_op(
    "mal_adapter::titans_write",
    mutates_args=(),
    schema=f"(Tensor[] initial, Tensor[] weights, Tensor[] momentum, Tensor keys, Tensor values, {_GATES}, {_ROWS}, "
    "bool save) -> Tensor[]",
)
def titans_write(
    initial: list[Tensor],
    weights: list[Tensor],
    momentum: list[Tensor],
    keys: Tensor,
    values: Tensor,
    step: Tensor,
    persist: Tensor,
    forget: Tensor,
    offsets: Tensor,
    valid: Tensor | None,
    chunk_size: int,
    longest: int,
    save: bool,
) -> list[Tensor]:
    """New weights, new momentum, and with `save` the scalars and everything of `Saved`; arguments as of
    `chunk_scalars` and `write_chunks`."""
    with torch.cuda.device_of(keys):
        tokens, whole = chunk_scalars(step, persist, forget, offsets, valid, chunk_size, longest)
        new_weights, new_momentum, saved = write_chunks(
            initial, weights, momentum, keys, values, tokens, whole, offsets, valid, chunk_size, precision(), save
        )
    kept = [] if saved is None else [tokens, whole, *saved.flat()]
    return [*new_weights, *new_momentum, *kept]


@titans_write.register_fake
def _(
    initial: list[Tensor],
    weights: list[Tensor],
    momentum: list[Tensor],
    keys: Tensor,
    values: Tensor,
    step: Tensor,
    persist: Tensor,
    forget: Tensor,
    offsets: Tensor,
    valid: Tensor | None,
    chunk_size: int,
    longest: int,
    save: bool,
) -> list[Tensor]:
    new = [w.new_empty(w.shape) for w in (*weights, *momentum)]
    if not save:
        return new
    count, heads = step.shape
    slots = count_slots(count, offsets.shape[0] - 1, chunk_size)
    scalars = [weights[0].new_empty((3, heads, n)) for n in (count, slots)]
    return [*new, *scalars, *Saved.empty(weights, slots, chunk_size).flat()]


@torch.library.custom_op(
    "mal_adapter::titans_write_backward",
    mutates_args=(),
    schema=f"(Tensor[] initial, Tensor keys, {_GATES}, {_ROWS}, Tensor[] saved, Tensor[] d_weights, "
    "Tensor[] d_momentum) -> Tensor[]",
)
def titans_write_backward(
    initial: list[Tensor],
    keys: Tensor,
    step: Tensor,
    persist: Tensor,
    forget: Tensor,
    offsets: Tensor,
    valid: Tensor | None,
    chunk_size: int,
    longest: int,
    saved: list[Tensor],
    d_weights: list[Tensor],
    d_momentum: list[Tensor],
) -> list[Tensor]:
    """The derivative with respect to initial, weights, momentum, keys, values, and the three gates' logits; keys and
    values in float32."""
    tokens, whole, *kept = saved
    with torch.cuda.device_of(keys):
        d = write_chunks_backward(
            *(initial, Saved.of(kept, len(initial)), keys, tokens, whole, offsets, valid, chunk_size, precision()),
            *(d_weights, d_momentum),
        )
        d_gates = chunk_scalars_backward(step, persist, forget, offsets, valid, chunk_size, longest, d.tokens, d.whole)
    return [*d.initial, *d.weights, *d.momentum, d.keys, d.values, *d_gates]


@titans_write_backward.register_fake
def _(
    initial: list[Tensor],
    keys: Tensor,
    step: Tensor,
    persist: Tensor,
    forget: Tensor,
    offsets: Tensor,
    valid: Tensor | None,
    chunk_size: int,
    longest: int,
    saved: list[Tensor],
    d_weights: list[Tensor],
    d_momentum: list[Tensor],
) -> list[Tensor]:
    state = [t.new_empty(t.shape) for t in (*initial, *d_weights, *d_momentum)]
    vectors = [keys.new_empty(keys.shape, dtype=torch.float32) for _ in range(2)]
    return [*state, *vectors, *(g.new_empty(g.shape) for g in (step, persist, forget))]


def _write_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    initial, _, _, keys, values, *gates, offsets, valid, chunk_size, longest, save = inputs
    if not save:
        raise RuntimeError("titans_write needs save=True where a gradient is recorded")
    # Zeros for what is saved, which nobody differentiates, would be as large as all of it.
    ctx.set_materialize_grads(False)
    ctx.layers, ctx.numbers = len(initial), (chunk_size, longest)
    ctx.values_dtype = values.dtype
    ctx.save_for_backward(*initial, keys, *gates, offsets, valid, *output)


def _write_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    n = ctx.layers
    initial, (keys, *gates), (offsets, valid), output = _parts(ctx.saved_tensors, n, 4, 2)
    given = [torch.zeros_like(out) if d is None else d for d, out in zip(grads, output[: 2 * n], strict=False)]
    flat = titans_write_backward(
        initial, keys, *gates, offsets, valid, *ctx.numbers, output[2 * n :], given[:n], given[n:]
    )
    d_initial, d_weights, d_momentum, (d_keys, d_values, *d_gates) = _parts(flat, n, n, n)
    vectors = (d_keys.to(keys.dtype), d_values.to(ctx.values_dtype))
    return d_initial, d_weights, d_momentum, *vectors, *d_gates, *(None,) * 5


titans_write.register_autograd(_write_backward, setup_context=_write_context)


@torch.library.custom_op(
    "mal_adapter::titans_read",
    mutates_args=(),
    schema="(Tensor[] initial, Tensor[] weights, Tensor queries, Tensor offsets, SymInt longest, bool normalize) "
    "-> Tensor",
)
def titans_read(
    initial: list[Tensor],
    weights: list[Tensor],
    queries: Tensor,
    offsets: Tensor,
    longest: int,
    normalize: bool,
) -> Tensor:
    """The answers; arguments as of `read_answers`."""
    with torch.cuda.device_of(queries):
        return read_answers(initial, weights, queries, offsets, longest, normalize, precision())


@titans_read.register_fake
def _(
    initial: list[Tensor],
    weights: list[Tensor],
    queries: Tensor,
    offsets: Tensor,
    longest: int,
    normalize: bool,
) -> Tensor:
    return queries.new_empty(queries.shape, dtype=torch.float32)


@torch.library.custom_op(
    "mal_adapter::titans_read_backward",
    mutates_args=(),
    schema="(Tensor[] initial, Tensor[] weights, Tensor queries, Tensor offsets, SymInt longest, bool normalize, "
    "Tensor d_answers) -> Tensor[]",
)
def titans_read_backward(
    initial: list[Tensor],
    weights: list[Tensor],
    queries: Tensor,
    offsets: Tensor,
    longest: int,
    normalize: bool,
    d_answers: Tensor,
) -> list[Tensor]:
    """The derivative with respect to weights and queries, in float32."""
    with torch.cuda.device_of(queries):
        d_weights, d_queries = read_answers_backward(
            initial, weights, queries, offsets, longest, normalize, precision(), d_answers
        )
    return [*d_weights, d_queries]


@titans_read_backward.register_fake
def _(
    initial: list[Tensor],
    weights: list[Tensor],
    queries: Tensor,
    offsets: Tensor,
    longest: int,
    normalize: bool,
    d_answers: Tensor,
) -> list[Tensor]:
    return [*(w.new_empty(w.shape) for w in weights), queries.new_empty(queries.shape, dtype=torch.float32)]


def _read_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    initial, weights, queries, offsets, longest, normalize = inputs
    ctx.layers, ctx.numbers = len(initial), (longest, normalize)
    ctx.save_for_backward(*initial, *weights, queries, offsets)


def _read_backward(ctx: Any, d_answers: Tensor) -> tuple[Any, ...]:
    n = ctx.layers
    initial, weights, (queries, offsets) = _parts(ctx.saved_tensors, n, n)
    flat = titans_read_backward(initial, weights, queries, offsets, *ctx.numbers, d_answers)
    d_weights, (d_queries,) = _parts(flat, n)
    return [d.sum(0) for d in d_weights], d_weights, d_queries.to(queries.dtype), *(None,) * 3


titans_read.register_autograd(_read_backward, setup_context=_read_context)


def _parts(tensors: Any, *lengths: int) -> list[list[Any]]:
    """The first so many tensors, the next so many, and the rest."""
    tensors, parts = list(tensors), []
    for length in lengths:
        parts.append(tensors[:length])
        del tensors[:length]
    return [*parts, tensors]
