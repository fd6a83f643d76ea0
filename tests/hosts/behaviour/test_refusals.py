"""Wrong use raises an error, and a mask of the user takes precedence.

Every test of this folder runs on every family of `builders.HOSTS`. The adapter is random rather than trained: its
residual is large, so a position that should not change and does is seen at once.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mal_adapter.errors import AudioMaskError, ConfigError, HostMismatchError, SessionError
from tests.hosts.behaviour.common import LAYER, attach, state_after
from tests.hosts.builders import TinyHost
from tests.hosts.probes import (
    assert_states_close,
    hook_census,
    random_adapter,
    same_bits,
    trace_layers,
)


@torch.no_grad()
def test_a_batch_needs_one_id_per_prompt(host: TinyHost, model: PreTrainedModel):
    inputs, _ = host.make_inputs(model, [[5], [4], [4]])
    memory = attach(model)
    for ids in ("call", ["call"], ["call", "other"], ["call", "other", "third", "fourth"], None):
        with memory.session(ids), pytest.raises((SessionError, AudioMaskError), match="3"):
            model(**inputs)
    assert all(memory.states[name].utterances.tolist() == [0] for name in memory.states)


def test_repeated_ids_and_nested_sessions_are_refused(host: TinyHost, model: PreTrainedModel):
    memory = attach(model)
    with pytest.raises(SessionError, match="call"), memory.session(["call", "call"]):
        pass
    with memory.session("outer"), pytest.raises(SessionError), memory.session("inner"):
        pass
    with memory.session("afterwards"):
        pass


@torch.no_grad()
def test_a_mask_of_the_wrong_shape_is_refused_with_both_shapes(host: TinyHost, model: PreTrainedModel):
    inputs, audio_mask = host.make_inputs(model, [[5], [4]])
    memory = attach(model)
    seq_len = audio_mask.shape[1]
    for wrong in (audio_mask[:, 1:], audio_mask[:1], audio_mask[0]):
        with pytest.raises(AudioMaskError) as raised, memory.session(["a", "b"], audio_mask=wrong):
            model(**inputs)
        assert str(seq_len) in str(raised.value)
        assert str(tuple(wrong.shape)) in str(raised.value)
    with pytest.raises(AudioMaskError, match="bool"), memory.session(["a", "b"], audio_mask=audio_mask.float()):
        model(**inputs)
    assert all(memory.states[name].utterances.tolist() == [0] for name in memory.states)


def test_a_layer_that_does_not_exist_is_refused(host: TinyHost, model: PreTrainedModel):
    census = hook_census(model)
    for layer_idx in (3, -4, 1000):
        with pytest.raises(ConfigError, match=r"0 … 2"):
            attach(model, layer_idx=layer_idx)
    with pytest.raises(HostMismatchError, match="48"):
        attach(model, adapter=random_adapter(width=48))
    assert hook_census(model) == census


@torch.no_grad()
def test_a_user_mask_wins_over_detection(host: TinyHost, model: PreTrainedModel):
    inputs, audio_mask = host.make_inputs(model, [[5], [4]])
    with trace_layers(host.layers(model), host.stream_idx) as bare:
        model(**inputs)
    mine = torch.zeros_like(audio_mask)
    mine[:, -2:] = True
    memory = attach(model)
    with memory.session(["a", "b"], audio_mask=mine), trace_layers(host.layers(model), host.stream_idx) as attached:
        model(**inputs)
    assert torch.equal((bare[LAYER].hidden_out != attached[LAYER].hidden_out).any(-1), mine)
    assert memory.states["a"].tokens.tolist() == [2]


@torch.no_grad()
def test_embeddings_alone_have_audio_only_with_a_users_mask(host: TinyHost, model: PreTrainedModel):
    inputs, audio_mask = host.make_inputs(model, [[5]])
    table = model.get_input_embeddings()
    # The placeholder may have no embedding: past the vocabulary.
    embeds = table(inputs["input_ids"].clamp(max=table.num_embeddings - 1))
    call = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    call |= host.beside_embeddings(model, inputs["input_ids"])
    bare = model(**call).logits
    memory = attach(model)
    with memory.session("unsaid"):
        assert same_bits(model(**call).logits, bare)
    with memory.session("said", audio_mask=audio_mask):
        assert not torch.equal(model(**call).logits, bare)
    assert "unsaid" not in memory.states or memory.states["unsaid"].utterances.tolist() == [0]
    assert memory.states["said"].tokens.tolist() == [int(audio_mask.sum())]


@torch.no_grad()
def test_features_with_embeddings_are_audio_only_if_the_host_merges_them(host: TinyHost, model: PreTrainedModel):
    """Without input_ids a host looks for the placeholder's embedding, ignores the features, or raises."""
    prompt = host.prompt([5], seed=1)
    with_ids, _ = host.collate(model, [prompt])

    def embedded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        ids, table = inputs["input_ids"], model.get_input_embeddings()
        call = {name: value for name, value in inputs.items() if name != "input_ids"}
        return call | {
            "inputs_embeds": table(ids.clamp(max=table.num_embeddings - 1)),
            **host.beside_embeddings(model, ids),
        }

    call = embedded(with_ids)
    try:
        merges = torch.allclose(model(**call).logits, model(**with_ids).logits, rtol=1e-4, atol=1e-4)
    except (RuntimeError, ValueError):
        merges = False
    memory = attach(model)
    assert bool(memory.host.merges_embeds) == merges
    if not merges:
        with memory.session("call"), pytest.raises(ValueError):  # noqa: PT011 - AudioMaskError, or the host's own
            model(**call)
        return
    expected = state_after(host, model, memory, [prompt])
    per_token = {name for name, value in with_ids.items() if value.shape == with_ids["input_ids"].shape}
    longer = {name: F.pad(value, (0, 1), value=1) if name in per_token else value for name, value in with_ids.items()}
    with memory.session("call"):
        model(**call, use_cache=False)
        model(**embedded(longer), use_cache=False)  # as in decoding without a cache
    assert_states_close(memory.states["call"], expected, 1e-5)


@torch.no_grad()
def test_a_forward_that_bypasses_the_hooks_uses_the_memory_or_is_refused(host: TinyHost, model: PreTrainedModel):
    """PEFT before 0.21 calls `model.forward`. An inner module that merges the audio is called as usual."""
    prompt = host.prompt([5], seed=1)
    inputs, audio_mask = host.collate(model, [prompt])
    memory = attach(model)
    expected = state_after(host, model, memory, [prompt])
    if host.multimodal_path:
        with memory.session("call"):
            model.forward(**inputs)
    else:
        with memory.session("call"), pytest.raises(AudioMaskError, match="was not called"):
            model.forward(**inputs)
        assert "call" not in memory.states
        with memory.session("call", audio_mask=audio_mask):
            model.forward(**inputs)
    assert_states_close(memory.states["call"], expected, 1e-6)
