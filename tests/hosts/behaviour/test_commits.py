"""When nothing is written: errors, read-only blocks, and audio outside a session.

Every test of this folder runs on every family of `builders.HOSTS`. The adapter is random rather than trained: its
residual is large, so a position that should not change and does is seen at once.
"""

import functools
import warnings

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mal_adapter.errors import AudioOutsideSessionWarning, SkippedWriteWarning
from tests.hosts.behaviour.common import LAYER, attach, greedy, state_after
from tests.hosts.builders import TinyHost
from tests.hosts.probes import assert_states_close, same_bits


def break_a_later_layer(host: TinyHost, model: PreTrainedModel):
    def hook(*_):
        raise ZeroDivisionError("a later layer")

    return host.layers(model)[LAYER + 1].register_forward_hook(hook)


@torch.no_grad()
def test_a_forward_that_raises_writes_nothing(host: TinyHost, model: PreTrainedModel):
    first, second = host.prompt([6], seed=1), host.prompt([4], seed=2)
    inputs, _ = host.collate(model, [second])
    memory = attach(model)
    before = state_after(host, model, memory, [first], "call")
    expected = state_after(host, model, memory, [first, second])
    broken = break_a_later_layer(host, model)
    for call in (
        model,
        functools.partial(model.generate, num_beams=2, max_new_tokens=4),
        functools.partial(model.generate, max_length=99),
    ):
        with memory.session("call"), pytest.raises(ZeroDivisionError):
            call(**inputs)
        assert_states_close(memory.states["call"], before, 0)
    broken.remove()
    with memory.session("call"):
        model(**inputs)
    assert_states_close(memory.states["call"], expected, 0)


@torch.no_grad()
def test_a_forward_that_raises_leaves_nothing_for_the_next_one_in_its_block(host: TinyHost, model: PreTrainedModel):
    """The next call, which has no audio, must not write what a failed call left behind."""
    first, second, text = host.prompt([6], seed=1), host.prompt([5], seed=2), host.prompt([], seed=3)
    memory = attach(model)
    with memory.session("call"):
        model(**host.collate(model, [first])[0])
        before = memory.states["call"].clone()
        broken = break_a_later_layer(host, model)
        with pytest.raises(ZeroDivisionError):
            model(**host.collate(model, [second])[0])
        broken.remove()
        model(**host.collate(model, [text])[0])
    assert_states_close(memory.states["call"], before, 0)


@torch.no_grad()
def test_write_false_reads_only(host: TinyHost, model: PreTrainedModel):
    first, second = host.prompt([6], seed=1), host.prompt([5], seed=2)
    inputs, _ = host.collate(model, [second])
    bare = model(**inputs).logits
    memory = attach(model)
    before = state_after(host, model, memory, [first], "call")
    with memory.session("call", write=False):
        read_only = model(**inputs).logits
        assert same_bits(model(**inputs).logits, read_only)
        greedy(model, inputs)
    assert_states_close(memory.states["call"], before, 0)
    with memory.session("call"):
        assert same_bits(model(**inputs).logits, read_only)
    assert memory.states["call"].utterances.tolist() == [2]
    assert not torch.equal(read_only, bare)


@torch.no_grad()
def test_disabled_runs_the_host_without_memory_also_inside_a_session(host: TinyHost, model: PreTrainedModel):
    inputs, _ = host.make_inputs(model, [[5]])
    bare = model(**inputs).logits
    memory = attach(model)
    with memory.disabled():
        assert same_bits(model(**inputs).logits, bare)
    with memory.session("call"):
        with memory.disabled():
            assert same_bits(model(**inputs).logits, bare)
            greedy(model, inputs)
        assert not torch.equal(model(**inputs).logits, bare)
    assert memory.states["call"].utterances.tolist() == [1]


@torch.no_grad()
def test_outside_a_session_the_host_runs_without_memory_and_warns_once(host: TinyHost, model: PreTrainedModel):
    inputs, _ = host.make_inputs(model, [[5]])
    text, _ = host.make_inputs(model, [[]])
    bare = model(**inputs).logits
    memory = attach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**text)
        with memory.disabled():
            model(**inputs)
    with pytest.warns(AudioOutsideSessionWarning):
        logits = model(**inputs).logits
    assert same_bits(logits, bare)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_bits(model(**inputs).logits, bare)
        greedy(model, inputs)
    assert list(memory.states) == []


def make_not_finite(host: TinyHost, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Fills the audio features with NaN or, where they are whole numbers, the table they are looked up in."""
    features = inputs[host.feature_argument]
    if features.is_floating_point():
        features.fill_(torch.nan)
    else:
        tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()]
        tables[0].weight.fill_(torch.nan)


@torch.no_grad()
def test_a_write_that_is_not_finite_is_skipped(host: TinyHost, model: PreTrainedModel):
    first, second = host.prompt([6], seed=1), host.prompt([5], seed=2)
    memory = attach(model)
    before = state_after(host, model, memory, [first], "call")
    inputs, _ = host.collate(model, [second])
    make_not_finite(host, model, inputs)
    with memory.session("call"), pytest.warns(SkippedWriteWarning):
        model(**inputs)
    after = memory.states["call"]
    assert after.skipped_writes.tolist() == [1]
    assert after.utterances.tolist() == [1]
    assert all(same_bits(a, b) for a, b in zip(before.weights, after.weights, strict=True))
