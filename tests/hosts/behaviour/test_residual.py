"""Where the residual is added, and what stays unchanged.

Every test of this folder runs on every family of `builders.HOSTS`. The adapter is random rather than trained: its
residual is large, so a position that should not change and does is seen at once.
"""

import pytest
import torch
from transformers import PreTrainedModel
from transformers.generation.logits_process import LogitsProcessorList

from tests.hosts.behaviour.common import DTYPES, LAYER, SIDES, Force, attach, greedy
from tests.hosts.builders import TinyHost
from tests.hosts.probes import assert_states_close, random_adapter, same_bits, trace_layers


@SIDES
@DTYPES
@torch.no_grad()
def test_only_audio_positions_of_the_hooked_layer_change(host: TinyHost, dtype: torch.dtype, padding_side: str):
    model = host.build(dtype, num_layers=3)
    inputs, audio_mask = host.make_inputs(model, [[4], [2, 5]], padding_side=padding_side)
    with trace_layers(host.layers(model), host.stream_idx) as bare:
        model(**inputs)
    memory = attach(model)
    with memory.session(["a", "b"]), trace_layers(host.layers(model), host.stream_idx) as attached:
        model(**inputs)
    for before, after in zip(bare, attached, strict=True):
        assert after.hidden_out.dtype == dtype
        if after.layer_idx < LAYER:
            assert same_bits(before.hidden_out, after.hidden_out)
    assert same_bits(bare[LAYER].hidden_in, attached[LAYER].hidden_in)
    assert same_bits(bare[LAYER].hidden_out[~audio_mask], attached[LAYER].hidden_out[~audio_mask])
    residual = attached[LAYER].hidden_out - bare[LAYER].hidden_out
    assert residual[audio_mask].abs().amax(-1).min() > 1e-2
    assert same_bits(attached[LAYER].hidden_out, attached[LAYER + 1].hidden_in)


@torch.no_grad()
def test_the_residual_is_the_adapters_read_and_the_write_gets_the_input_of_the_next_layer(
    host: TinyHost, model: PreTrainedModel
):
    prompts = [host.prompt([4], seed=1), host.prompt([7, 3], seed=2)]
    adapter = random_adapter()
    state, expected = adapter.initial_state(), []
    for prompt in prompts:
        inputs, audio_mask = host.collate(model, [prompt])
        with trace_layers(host.layers(model), host.stream_idx) as bare:
            model(**inputs)
        hidden_states = bare[LAYER].hidden_out
        expected.append(hidden_states + adapter.read(state, hidden_states, audio_mask))
        state = adapter.write(state, expected[-1][audio_mask][None])
    memory = attach(model, adapter=adapter)
    with memory.session("call"), trace_layers(host.layers(model), host.stream_idx) as attached:
        for prompt in prompts:
            model(**host.collate(model, [prompt])[0])
    outputs = [call.hidden_out for call in attached if call.layer_idx == LAYER]
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=0, atol=1e-6 * max(1.0, float(wanted.abs().max())))
    assert_states_close(memory.states["call"], state, 1e-6)


@torch.no_grad()
def test_trap_08_output_hidden_states_shows_the_residual(host: TinyHost, model: PreTrainedModel):
    if "hidden_states" in host.cannot:
        pytest.skip("the host can't")
    inputs, audio_mask = host.make_inputs(model, [[4], [7]])
    bare = model(**inputs, output_hidden_states=True).hidden_states
    memory = attach(model)
    with memory.session(["a", "b"]), trace_layers(host.layers(model), host.stream_idx) as calls:
        attached = model(**inputs, output_hidden_states=True).hidden_states
    assert len(bare) == len(attached)
    assert same_bits(host.stream(attached[LAYER + 1]), calls[LAYER].hidden_out)
    changed = host.stream(bare[LAYER + 1] != attached[LAYER + 1]).any(-1)
    assert torch.equal(changed, audio_mask)


@SIDES
@torch.no_grad()
def test_masks_positions_and_cache_lengths_are_as_without_memory(
    host: TinyHost, model: PreTrainedModel, padding_side: str
):
    inputs, _ = host.make_inputs(model, [[4], [7, 2]], padding_side=padding_side)
    runs = []
    memory = attach(model)
    for scope in (memory.disabled(), memory.session(["a", "b"])):
        with scope, trace_layers(host.layers(model), host.stream_idx) as calls:
            model(**inputs)
            # Different tokens would also give different masks, so the same tokens are forced.
            greedy(model, inputs, logits_processor=LogitsProcessorList([Force(5)]))
        runs.append(calls)
    for bare, attached in zip(*runs, strict=True):
        assert bare.surroundings.keys() == attached.surroundings.keys()
        for what, value in bare.surroundings.items():
            assert same_bits(value, attached.surroundings[what]), (what, value, attached.surroundings[what])
    assert any(call.surroundings["cache_length_after"] is not None for call in runs[0])
