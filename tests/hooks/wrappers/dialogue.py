"""One dialogue through a host with a memory, whatever is wrapped around it, and whether two of them are alike."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mal_adapter import AttachedMemory, MemoryState, attach_memory
from tests.hosts.builders import TinyHost
from tests.hosts.probes import assert_states_close, hook_census, random_adapter, state_bytes

__all__ = ["LAYER", "Heard", "Turn", "assert_heard_alike", "attach", "hear", "left_as_found", "make_turns"]

LAYER = 1  # of three: a layer before it and a layer after it

Turn = dict[str, Tensor]
"""The keyword arguments of one forward."""


@dataclass(frozen=True)
class Heard:
    """What a host answered to the utterances of a dialogue, (batch, seq_len, vocab) each, and what its memory keeps."""

    logits: list[Tensor]
    state: MemoryState


def make_turns(host: TinyHost, model: nn.Module, clips: Sequence[int] = (4, 4, 4), seed: int = 0) -> list[Turn]:
    """One utterance per entry of `clips`, that many audio tokens long."""
    return [
        host.collate(model, [host.prompt([tokens], seed=100 * seed + turn)])[0] for turn, tokens in enumerate(clips)
    ]


def attach(model: nn.Module, layer_idx: int = LAYER, **options: Any) -> AttachedMemory:
    return attach_memory(model, layer_idx=layer_idx, **({"adapter": random_adapter()} | options))


def hear(model: nn.Module, memory: AttachedMemory, turns: Sequence[Turn]) -> Heard:
    """A new dialogue of one forward per turn; each utterance is written once."""
    with memory.session("heard"):
        logits = [model(**turn, use_cache=False).logits for turn in turns]
    assert "heard" in memory.states, "no utterance was written"
    state = memory.states.pop("heard")
    assert state.utterances.tolist() == [len(turns)]
    return Heard(logits, state)


def assert_heard_alike(heard: Heard, expected: Heard, tolerance: float = 1e-5) -> None:
    """Equal within `tolerance` of the largest entry, states and logits."""
    assert_states_close(heard.state, expected.state, tolerance)
    for a, b in zip(heard.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.detach().abs().max()))


@contextlib.contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """After the block, weights, hooks and instance attributes are those from before it."""
    weights, census = state_bytes(model), hook_census(model)
    yield
    assert state_bytes(model) == weights
    assert hook_census(model) == census
