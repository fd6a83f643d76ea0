"""Eager and sdpa attention: masks of another form, the same answers within rounding."""

import torch
from transformers import PreTrainedModel

from tests.hooks.wrappers.dialogue import Heard, assert_heard_alike, attach, hear, make_turns
from tests.hosts.builders import TinyHost


@torch.no_grad()
def test_the_implementation_may_change_under_a_memory(host: TinyHost, model: PreTrainedModel):
    turns = make_turns(host, model)
    memory = attach(model)
    expected = hear(model, memory, turns)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert_heard_alike(hear(model, memory, turns), expected)


@torch.no_grad()
def test_a_padded_batch_is_heard_alike(host: TinyHost, model: PreTrainedModel):
    """Padding is where the implementations' masks differ."""
    inputs, _ = host.make_inputs(model, [[3], [7]])
    memory, heard = attach(model), []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        names = [f"{implementation} {row}" for row in range(2)]
        with memory.session(names):
            for _ in range(2):
                logits = model(**inputs).logits
        real = inputs["attention_mask"].bool()
        heard.append([Heard([logits[row][real[row]]], memory.states[name]) for row, name in enumerate(names)])
    for a, b in zip(*heard, strict=True):
        assert_heard_alike(a, b, 1e-4)
