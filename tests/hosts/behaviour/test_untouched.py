"""What a memory does not change: a fresh memory changes nothing, and after `detach` no memory does.

Every test of this folder runs on every family of `builders.HOSTS`. The adapter is random rather than trained: its
residual is large, so a position that should not change and does is seen at once.
"""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from transformers import PreTrainedModel

from mal_adapter import attach_memory
from mal_adapter.errors import AudioOutsideSessionWarning
from tests.hosts.behaviour.common import DTYPES, LAYER, attach, greedy
from tests.hosts.builders import TinyHost
from tests.hosts.probes import (
    assert_states_close,
    hook_census,
    random_adapter,
    same_bits,
    small_config,
    trace_layers,
)


@DTYPES
@torch.no_grad()
def test_a_fresh_adapter_gives_the_same_bits_as_no_memory(host: TinyHost, dtype: torch.dtype):
    model = host.build(dtype, num_layers=3)
    inputs, _ = host.make_inputs(model, [[4], [7]])
    logits, generated = model(**inputs).logits, greedy(model, inputs)
    memory = attach_memory(model, layer_idx=LAYER, config=small_config())
    for _ in range(2):  # the second time there is something to read
        with memory.session(["a", "b"]):
            assert same_bits(model(**inputs).logits, logits)
            again = greedy(model, inputs)
        assert same_bits(again.sequences, generated.sequences)
        assert all(same_bits(x, y) for x, y in zip(again.scores, generated.scores, strict=True))
    assert memory.states["a"].utterances.tolist() == [4]
    assert any(weights.abs().max() > 0 for weights in memory.states["a"].weights)


@DTYPES
@torch.no_grad()
def test_detach_restores_the_host_bit_for_bit_and_leaves_no_hook(host: TinyHost, dtype: torch.dtype):
    model = host.build(dtype, num_layers=3)
    inputs, _ = host.make_inputs(model, [[4], [7]])
    logits, generated, census = model(**inputs).logits, greedy(model, inputs), hook_census(model)
    memory = attach(model)
    assert hook_census(model) != census
    with memory.session(["a", "b"]):
        assert not torch.equal(model(**inputs).logits, logits)
        greedy(model, inputs)
    memory.detach()
    assert hook_census(model) == census
    assert same_bits(model(**inputs).logits, logits)
    again = greedy(model, inputs)
    assert same_bits(again.sequences, generated.sequences)
    assert all(same_bits(x, y) for x, y in zip(again.scores, generated.scores, strict=True))
    memory.detach()  # a second time is no error
    assert hook_census(model) == census


@torch.no_grad()
def test_leaving_the_with_block_detaches_the_memory(host: TinyHost, model: PreTrainedModel):
    census = hook_census(model)
    with pytest.raises(ZeroDivisionError), attach(model):
        raise ZeroDivisionError
    assert hook_census(model) == census


@torch.no_grad()
def test_two_memories_on_two_layers_are_independent(host: TinyHost, model: PreTrainedModel):
    first, second = host.prompt([5], seed=1), host.prompt([4], seed=2)
    inputs, _ = host.collate(model, [second])
    early = attach(model, 0, adapter=random_adapter(seed=1))
    with early.session("call"):
        model(**host.collate(model, [first])[0])
        only_early = model(**inputs).logits
    late = attach(model, 2, adapter=random_adapter(seed=2))
    with early.session("again"), late.session("again"), trace_layers(host.layers(model), host.stream_idx) as calls:
        model(**host.collate(model, [first])[0])
        both = model(**inputs).logits
    assert_states_close(early.states["again"], early.states["call"], 0)  # a later layer can't reach an earlier one
    assert early.states["again"].utterances.tolist() == late.states["again"].utterances.tolist() == [2]
    assert not torch.equal(both, only_early)
    with early.session("third"), warnings.catch_warnings():
        warnings.simplefilter("ignore", AudioOutsideSessionWarning)
        model(**host.collate(model, [first])[0])
        assert same_bits(model(**inputs).logits, only_early)
    late.detach()
    with early.session("fourth"):
        model(**host.collate(model, [first])[0])
        assert same_bits(model(**inputs).logits, only_early)
    early.detach()
    assert len(calls) == 6


@torch.no_grad()
def test_detach_frees_everything(host: TinyHost, model: PreTrainedModel):
    inputs, _ = host.make_inputs(model, [[5]])
    memory = attach(model)
    with memory.session("call"):
        greedy(model, inputs)
        model(**inputs)
    references = [weakref.ref(memory), weakref.ref(memory.adapter), weakref.ref(memory.states["call"].weights[0])]
    memory.detach()
    del memory
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


@torch.no_grad()
def test_a_session_leaves_no_tensor_of_a_forward_alive(host: TinyHost, model: PreTrainedModel):
    """Hooks keep nothing between calls: the hidden states of an utterance are freed after it."""
    memory = attach(model)
    inputs, _ = host.make_inputs(model, [[5]])
    references = []

    def watch(_module, args, out):
        references.append(weakref.ref(out[0] if isinstance(out, tuple) else out))

    handle = host.layers(model)[LAYER].register_forward_hook(watch)
    with memory.session("call"):
        model(**inputs, use_cache=False)
        gc.collect()
        assert [reference() for reference in references] == [None]
    handle.remove()


@torch.no_grad()
def test_an_attached_model_can_be_copied_and_pickled(host: TinyHost, model: PreTrainedModel):
    inputs, _ = host.make_inputs(model, [[5]])
    memory = attach(model)
    with memory.session("call"):
        expected = model(**inputs).logits
    before = memory.states["call"].clone()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with memory.session("call", write=False):
            model(**inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AudioOutsideSessionWarning)
            assert twin(**inputs).logits.shape == expected.shape
        assert {name: t.shape for name, t in twin.state_dict().items()} == {
            name: t.shape for name, t in model.state_dict().items()
        }
    assert_states_close(memory.states["call"], before, 0)
