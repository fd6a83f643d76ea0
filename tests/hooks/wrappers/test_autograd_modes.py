"""inference_mode, no_grad and autocast around a session, in any order with training."""

import contextlib
import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mal_adapter import AttachedMemory
from tests.hooks.wrappers.dialogue import Turn, attach, hear, make_turns
from tests.hosts.builders import TinyHost
from tests.hosts.probes import assert_states_close, same_bits


@pytest.fixture
def turns(host: TinyHost, model: PreTrainedModel) -> list[Turn]:
    return make_turns(host, model)


@pytest.fixture
def memory(model: PreTrainedModel) -> AttachedMemory:
    return attach(model.requires_grad_(False))


def bf16() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def assert_all_have_gradients(memory: AttachedMemory) -> None:
    assert all(p.grad is not None and p.grad.isfinite().all() for p in memory.parameters())


# ------------------------------------------------------------------------------------------- no_grad, inference_mode


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_mode_changes_no_bit(
    model: PreTrainedModel,
    memory: AttachedMemory,
    turns: list[Turn],
    mode: Callable[[], AbstractContextManager[None]],
    training: bool,
):
    """Without autograd the memory is written in place, in a copy; to the same bits, up to the order of additions."""
    with torch.no_grad():
        expected = hear(model, memory, turns)
    memory.train(training)
    with mode():
        heard = hear(model, memory, turns)
    assert_states_close(heard.state, expected.state, 1e-6)
    for a, b in zip(heard.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert not any(t.is_inference() or t.requires_grad for t in (*heard.state.weights, *heard.state.momentum))


def test_a_dialogue_begun_in_inference_mode_can_be_trained_on(
    model: PreTrainedModel, memory: AttachedMemory, turns: list[Turn]
):
    with torch.inference_mode(), memory.session("call"):
        model(**turns[0])
        model.generate(**turns[1], max_new_tokens=2)
    assert memory.states["call"].utterances.tolist() == [2]
    assert not any(t.is_inference() for t in memory.states["call"].weights)
    memory.train()
    with memory.session("call"):
        model(**turns[2])
        model(**turns[0]).logits.square().mean().backward()
    assert_all_have_gradients(memory)
    assert not any(t.requires_grad for t in (*memory.states["call"].weights, *memory.states["call"].momentum))


def test_a_state_born_in_inference_mode_can_be_trained_on(
    model: PreTrainedModel, memory: AttachedMemory, turns: list[Turn]
):
    with torch.inference_mode():
        memory.states["call"] = memory.adapter.initial_state()
    memory.train()
    with memory.session("call"):
        model(**turns[0])
        model(**turns[1]).logits.square().mean().backward()
    assert_all_have_gradients(memory)


def test_a_session_opened_in_inference_mode_can_be_trained_in(
    model: PreTrainedModel, memory: AttachedMemory, turns: list[Turn]
):
    memory.train()
    with contextlib.ExitStack() as stack:
        with torch.inference_mode():
            stack.enter_context(memory.session("call"))
        model(**turns[0])
        model(**turns[1]).logits.square().mean().backward()
    assert_all_have_gradients(memory)


def test_the_mode_may_change_from_utterance_to_utterance(
    model: PreTrainedModel, memory: AttachedMemory, turns: list[Turn]
):
    """Heard without autograd, the past of a training session is a constant; what is recorded after it still counts."""
    with torch.no_grad():
        expected = hear(model, memory, turns)
    memory.train()
    for mode in (torch.no_grad, torch.inference_mode):
        memory.adapter.zero_grad()
        with memory.session("call"):
            with mode():
                model(**turns[0])
            model(**turns[1])
            model(**turns[2]).logits.square().mean().backward()
        assert_states_close(memory.states.pop("call"), expected.state, 1e-6)
        assert_all_have_gradients(memory)


def test_in_eval_mode_no_graph_grows_from_utterance_to_utterance(
    model: PreTrainedModel, memory: AttachedMemory, turns: list[Turn]
):
    """Serving without no_grad must not keep every past utterance's activations alive."""
    kept: list[weakref.ref[Any]] = []
    # What the norm gives is saved for the projections' gradient, in the read's graph and in the write's.
    handle = memory.adapter.norm.register_forward_hook(lambda _m, _a, out: kept.append(weakref.ref(out)))
    with memory.session("call"):
        for turn in turns:
            model(**turn, use_cache=False)
        gc.collect()
        assert [reference() for reference in kept] == [None] * 2 * len(turns)
    handle.remove()


# ---------------------------------------------------------------------------------------------------------- autocast


def distance(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> float:
    """Of all tensors of a from those of b, relative to b's."""
    x, y = (torch.cat([t.detach().flatten().float() for t in tensors]) for tensors in (a, b))
    return float((x - y).norm() / y.norm())


@torch.no_grad()
def test_under_autocast_the_state_is_fp32_and_right_within_bf16s_rounding(
    model: PreTrainedModel, memory: AttachedMemory, turns: list[Turn]
):
    exact = hear(model, memory, turns)
    with bf16():
        heard = hear(model, memory, turns)
    assert {t.dtype for t in (*heard.state.weights, *heard.state.momentum)} == {torch.float32}
    assert distance(heard.state.weights, exact.state.weights) < 0.05
    assert distance(heard.state.momentum, exact.state.momentum) < 0.05
    assert {logits.dtype for logits in heard.logits} == {torch.bfloat16}


@torch.no_grad()
def test_a_fresh_adapter_changes_no_bit_under_autocast_either(model: PreTrainedModel, turns: list[Turn]):
    with bf16():
        bare = [model(**turn, use_cache=False).logits for turn in turns]
        with attach(model, adapter=None) as memory:
            heard = hear(model, memory, turns)
    assert all(same_bits(a, b) for a, b in zip(heard.logits, bare, strict=True))


@torch.no_grad()
def test_autocasts_error_does_not_grow_with_the_dialogue(memory: AttachedMemory):
    """The state is fp32, so a write's rounding is forgotten with the write and none is added to the past."""
    adapter = memory.adapter
    utterances = torch.randn(60, 1, 8, adapter.config.hidden_size, generator=torch.Generator().manual_seed(0))
    exact = rounded = adapter.initial_state()
    errors = []
    for utterance in utterances:
        exact = adapter.write(exact, utterance)
        with bf16():
            rounded = adapter.write(rounded, utterance)
        errors.append(distance(rounded.weights, exact.weights))
    assert max(errors[-10:]) < 2 * max(errors[:10]) < 0.05


def test_training_under_autocast_gives_the_gradients_within_bf16s_rounding(
    model: PreTrainedModel, memory: AttachedMemory, turns: list[Turn]
):
    memory.train()
    gradients = []
    for mode in (contextlib.nullcontext, bf16):
        memory.adapter.zero_grad()
        with mode():
            loss = hear(model, memory, turns).logits[-1][:, -1].float().square().mean()
        loss.backward()  # as torch advises, outside of autocast
        gradients.append(tuple(p.grad.clone() for p in memory.parameters()))
        assert {gradient.dtype for gradient in gradients[-1]} == {torch.float32}
    exact, rounded = gradients
    assert distance(rounded, exact) < 0.1
