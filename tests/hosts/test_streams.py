"""Hosts with parallel streams of hidden states between layers: one is read and written, the others do not change."""

import pytest
import torch

from mal_adapter import attach_memory
from tests.hosts.builders import HOSTS, TinyHost
from tests.hosts.probes import random_adapter, same_bits, trace_layers

LAYER = 1


@pytest.mark.parametrize("host", [host for host in HOSTS.values() if host.stream_idx is not None], ids=lambda h: h.name)
@torch.no_grad()
def test_the_residual_is_added_only_to_the_stream_that_the_next_layer_attends_to(host: TinyHost):
    model = host.build(num_layers=3)
    inputs, audio_mask = host.make_inputs(model, [[4], [7]])
    with trace_layers(host.layers(model)) as bare:
        model(**inputs)
    memory = attach_memory(model, layer_idx=LAYER, adapter=random_adapter())
    with memory.session(["a", "b"]), trace_layers(host.layers(model)) as attached:
        model(**inputs)
    assert memory.host.stream_idx == host.stream_idx == model.config.get_text_config(decoder=True).altup_active_idx
    before, after = bare[LAYER].hidden_out, attached[LAYER].hidden_out
    assert before.shape == after.shape == (3, *audio_mask.shape, before.shape[-1])
    for stream_idx, (x, y) in enumerate(zip(before, after, strict=True)):
        if stream_idx == host.stream_idx:
            assert torch.equal((x != y).any(-1), audio_mask)
        else:
            assert same_bits(x, y)
