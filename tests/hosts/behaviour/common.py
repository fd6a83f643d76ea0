"""Shared by the tests of this folder: attach a memory, and generate."""

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.logits_process import LogitsProcessor

from mal_adapter import AttachedMemory, MemoryState, attach_memory
from tests.hosts.builders import Prompt, TinyHost
from tests.hosts.probes import random_adapter

LAYER = 1  # of three: a layer before it and a layer after it
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SIDES = pytest.mark.parametrize("padding_side", ["left", "right"])


def attach(model: nn.Module, layer_idx: int = LAYER, **options) -> AttachedMemory:
    return attach_memory(model, layer_idx=layer_idx, **({"adapter": random_adapter()} | options))


def greedy(model: PreTrainedModel, inputs: dict[str, Tensor], **options):
    return model.generate(
        **inputs,
        **{"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_scores": True, **options},
    )


def state_after(
    host: TinyHost, model: PreTrainedModel, memory: AttachedMemory, prompts: list[Prompt], session_id: str = "expected"
) -> MemoryState:
    """The state of a fresh dialogue after one forward per prompt."""
    with torch.no_grad(), memory.session(session_id):
        for prompt in prompts:
            model(**host.collate(model, [prompt])[0])
    return memory.states[session_id]


class Force(LogitsProcessor):
    """Makes one token id certain."""

    def __init__(self, token_id: int, at_step: int | None = None):
        self.token_id, self.at_step, self.step = token_id, at_step, -1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.step += 1
        if self.at_step in (None, self.step):
            scores = torch.full_like(scores, -1e9)
            scores[:, self.token_id] = 0
        return scores
