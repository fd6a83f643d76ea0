"""Which rows of vLLM's flat batch are an utterance's audio: plain arithmetic on the scheduler's output.

vLLM is not imported here. A step is any object with the fields of `vllm.v1.core.sched.output.SchedulerOutput` that are
named below, so that tests need no engine.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from mal_adapter.errors import AudioMaskError

__all__ = ["Positions", "audio_positions", "inside", "positions_of_step", "rows_of_step"]

Positions = Int64[Tensor, " _audio_tokens"]  # of each request another number


class Inside(NamedTuple):
    """How much of an utterance is computed in one step."""

    tokens: int
    whole: bool


def audio_positions(features: Iterable[Any] | None) -> Positions | None:
    """The positions of a prompt's audio tokens, sorted; None if it has no audio.

    Args:
        features: A request's `mm_features`: each has a `modality` and an `mm_position` with `offset`, `length` and
            `is_embed`, a (length,) bool tensor that is False at markers between audio tokens, or None.
    """
    clips = []
    for feature in features or ():
        if feature.modality != "audio":
            continue
        where = feature.mm_position
        positions = torch.arange(where.offset, where.offset + where.length)
        clips.append(positions if where.is_embed is None else positions[where.is_embed.cpu()])
    positions = torch.cat(clips).sort().values if clips else torch.empty(0, dtype=torch.int64)
    return positions if len(positions) else None


def positions_of_step(step: Any) -> dict[str, range]:
    """The positions of each request's prompt and answer that this step computes.

    Args:
        step: Has `num_scheduled_tokens`, `scheduled_new_reqs` and `scheduled_cached_reqs`.
    """
    computed = {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
    cached = step.scheduled_cached_reqs
    computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    return {
        request: range(computed[request], computed[request] + count)
        for request, count in step.num_scheduled_tokens.items()
    }


def inside(audio: Positions, computed: range) -> Inside:
    """How many of these positions are computed, and whether that is all of them.

    Example:
        >>> inside(torch.tensor([2, 3, 5]), range(0, 4))
        Inside(tokens=2, whole=False)
    """
    first, after = torch.searchsorted(audio, torch.tensor([computed.start, computed.stop])).tolist()
    return Inside(after - first, after - first == len(audio))


def rows_of_step(
    order: Sequence[str], computed: Mapping[str, range], audio: Mapping[str, Positions]
) -> dict[str, Positions]:
    """The rows of the flat batch at which these requests have audio.

    Args:
        order: The requests in the order of the batch, whose rows are one request after the other.
        computed: The positions of each request, from `positions_of_step`.
        audio: The positions of audio of some of them, all computed in this step.

    Raises:
        AudioMaskError: The batch has other requests than the step.

    Example:
        >>> step = {"a": range(0, 4), "b": range(9, 10), "c": range(0, 3)}
        >>> rows_of_step(["b", "c", "a"], step, {"a": torch.tensor([1, 2])})
        {'a': tensor([5, 6])}
    """
    if len(order) != len(computed) or set(order) != computed.keys():
        raise AudioMaskError(
            f"the batch has {len(order)} requests and the scheduler's step {len(computed)}, or they are not the same; "
            "this is another version of vLLM than mal_adapter knows"
        )
    rows, start = {}, 0
    for request in order:
        if request in audio:
            rows[request] = audio[request] - computed[request].start + start
        start += len(computed[request])
    return rows
