"""vLLM's data classes as far as mal_adapter reads them, and an engine without a model.

`test_engine_facts.py` compares the fields with vLLM's, where it is installed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mal_adapter import MemoryAdapter
from mal_adapter.vllm.memory import EngineMemory
from mal_adapter.vllm.op import add_memory, running
from mal_adapter.vllm.sessions import StepSessions

__all__ = [
    "CachedRequestData",
    "FakeEngine",
    "MultiModalFeatureSpec",
    "NewRequestData",
    "PlaceholderRange",
    "Request",
    "SamplingParams",
    "SchedulerOutput",
]


@dataclasses.dataclass
class PlaceholderRange:
    offset: int
    length: int
    is_embed: Tensor | None = None


@dataclasses.dataclass
class MultiModalFeatureSpec:
    modality: str
    mm_position: PlaceholderRange


@dataclasses.dataclass
class SamplingParams:
    extra_args: dict[str, Any] | None = None
    n: int = 1


@dataclasses.dataclass
class NewRequestData:
    req_id: str
    mm_features: list[MultiModalFeatureSpec]
    sampling_params: SamplingParams | None
    num_computed_tokens: int = 0


@dataclasses.dataclass
class CachedRequestData:
    req_ids: list[str] = dataclasses.field(default_factory=list)
    num_computed_tokens: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class SchedulerOutput:
    scheduled_new_reqs: list[NewRequestData]
    scheduled_cached_reqs: CachedRequestData
    num_scheduled_tokens: dict[str, int]
    finished_req_ids: set[str] = dataclasses.field(default_factory=set)


@dataclasses.dataclass
class Request:
    """A request and its hidden states below the hooked layer, (tokens, hidden_size)."""

    req_id: str
    params: SamplingParams
    features: list[MultiModalFeatureSpec]
    hidden: Tensor
    computed: int = 0
    known: bool = False


class FakeEngine:
    """Runs steps of a scheduler's choice through `EngineMemory`, with given hidden states instead of a model.

    Args:
        adapter: The memory's.
        sessions: Its states.
        v2: Send a preempted request as a new one, as vLLM does for model runner V2.
    """

    def __init__(self, adapter: MemoryAdapter, sessions: StepSessions, *, v2: bool = False) -> None:
        self.order: list[str] = []
        self.memory = EngineMemory(adapter, lambda: self.order, sessions)
        self.finished: set[str] = set()
        self.v2 = v2

    def step(self, chunks: dict[str, int], requests: dict[str, Request], order: list[str]) -> dict[str, Tensor]:
        """Compute so many tokens of each request, in a batch of this order. Returns what the layers above see of each,
        (tokens, hidden_size)."""
        new = [requests[r] for r in chunks if not requests[r].known]
        old = [requests[r] for r in chunks if requests[r].known]
        self.memory.begin(
            SchedulerOutput(
                [NewRequestData(r.req_id, r.features, r.params, r.computed) for r in new],
                CachedRequestData([r.req_id for r in old], [r.computed for r in old]),
                chunks,
                self.finished,
            )
        )
        self.finished = set()
        self.order[:] = order
        parts = [requests[r].hidden[requests[r].computed : requests[r].computed + chunks[r]] for r in order]
        whole = torch.cat(parts)
        residual = 0.25 * whole  # vLLM's layers return two tensors, of which the stream is the sum
        hidden = whole - residual
        with running(self.memory):
            add_memory(None, (), (hidden, residual))
        self.memory.end(succeeded=True)
        for r in chunks:
            requests[r].known = True
            requests[r].computed += chunks[r]
        return dict(zip(order, (hidden + residual).split([chunks[r] for r in order]), strict=True))

    def preempt(self, request: Request) -> None:
        """Its keys and values are gone: it is computed again from its first token."""
        request.computed = 0
        request.known = not self.v2

    def finish(self, request: Request) -> None:
        """It has ended, or was aborted."""
        self.finished.add(request.req_id)
