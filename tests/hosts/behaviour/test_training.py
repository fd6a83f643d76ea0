"""Gradients through utterances, and a host that does not change.

Every test of this folder runs on every family of `builders.HOSTS`. The adapter is random rather than trained: its
residual is large, so a position that should not change and does is seen at once.
"""

import pytest
import torch
from torch import Tensor, nn

from tests.hosts.behaviour.common import attach, greedy
from tests.hosts.builders import TinyHost
from tests.hosts.probes import assert_states_close, state_bytes


def loss_of(logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, -1], torch.tensor([3, 9]))


def test_attach_run_train_step_and_detach_leave_the_host_unchanged(host: TinyHost, trained):
    model, memory, turns = trained
    memory.detach()
    before = state_bytes(model)
    memory = attach(model)
    memory.train()
    assert state_bytes(model) == before
    optimizer = torch.optim.AdamW(memory.parameters(), lr=1e-2)
    parameters_before = [p.detach().clone() for p in memory.parameters()]
    for dialogue in range(2):
        with memory.session([f"{dialogue} a", f"{dialogue} b"]):
            for turn in turns:
                loss = loss_of(model(**turn).logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert any(not torch.equal(p, q) for p, q in zip(memory.parameters(), parameters_before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert state_bytes(model) == before
    model.eval()
    memory.eval()
    with torch.no_grad(), memory.session(["a", "b"]):
        greedy(model, turns[0])
    assert state_bytes(model) == before
    memory.detach()
    assert state_bytes(model) == before


def test_the_memorys_parameters_do_not_include_the_hosts(host: TinyHost, trained):
    model, memory, _ = trained
    backbone = {id(p) for p in model.parameters()}
    mine = list(memory.parameters())
    assert mine
    assert not backbone & {id(p) for p in mine}
    assert {id(p) for p in mine} == {id(p) for p in memory.adapter.parameters()}
    assert not {id(p) for p in memory.adapter.parameters()} & {id(p) for p in model.parameters()}


def test_the_second_utterances_loss_reaches_the_write_of_the_first(host: TinyHost, trained):
    """Only writes use values and gates: their gradients come through the state, from one forward to the next."""
    model, memory, turns = trained
    adapter = memory.adapter
    width, heads = adapter.config.memory_dim, adapter.config.num_heads
    value_rows = slice(3 * width, 4 * width)
    step_rows = slice(4 * width, 4 * width + heads)

    with memory.session(["a", "b"]):
        loss_of(model(**turns[0]).logits).backward()
    assert adapter.in_proj.weight.grad[value_rows].abs().max() == 0
    adapter.zero_grad()
    with memory.session(["c", "d"]):
        model(**turns[0])
        loss_of(model(**turns[1]).logits).backward()
    assert adapter.in_proj.weight.grad[value_rows].abs().max() > 1e-8
    assert adapter.in_proj.weight.grad[step_rows].abs().max() > 1e-8
    assert all(p.grad is not None and p.grad.isfinite().all() for p in memory.parameters())


@pytest.mark.parametrize("only_write", [False, True], ids=["all parameters", "those of the write"])
def test_the_gradient_through_two_utterances_equals_the_finite_difference(host: TinyHost, trained, only_write: bool):
    """Against a central difference of the whole run along a random direction."""
    model, memory, turns = trained
    model.double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped matrix product has no float64
    for path in host.float32_modules:
        model.get_submodule(path).float()
    adapter = memory.adapter.double()
    turns = [{k: v.double() if v.is_floating_point() else v for k, v in turn.items()} for turn in turns]

    def loss() -> Tensor:
        memory.states.clear()
        with memory.session(["a", "b"]):
            model(**turns[0])
            return loss_of(model(**turns[1]).logits)

    loss().backward()
    torch.manual_seed(0)
    direction = {name: torch.randn_like(p) for name, p in adapter.named_parameters()}
    if only_write:
        width = adapter.config.memory_dim
        direction = {name: torch.zeros_like(d) for name, d in direction.items()}
        direction["in_proj.weight"][3 * width :].normal_()  # values, gates
    norm = torch.stack([d.square().sum() for d in direction.values()]).sum().sqrt()
    gradient = {name: p.grad.clone() for name, p in adapter.named_parameters()}
    slope = sum((gradient[name] * d).sum() for name, d in direction.items()) / norm
    scale = torch.stack([(gradient[name] * (d != 0)).square().sum() for name, d in direction.items()]).sum().sqrt()
    step, values = 4e-2, []  # hosts normalise in float32 whatever their dtype, so a smaller step drowns in rounding
    with torch.no_grad():
        for sign in (1, -2):
            for name, p in adapter.named_parameters():
                p.add_(direction[name], alpha=float(sign * step / norm))
            values.append(loss())
    assert scale > 0
    difference = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(difference.double(), slope.double(), rtol=0, atol=1e-3 * float(scale))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_neither_state_nor_gradients(host: TinyHost, trained, use_reentrant: bool):
    if "checkpointing" in host.cannot:
        pytest.skip("the host has no gradient checkpointing")
    if use_reentrant and "input_grads" in host.cannot:
        pytest.skip("the host can't give its embeddings a gradient")
    model, memory, turns = trained

    def run():
        memory.adapter.zero_grad()
        with memory.session(["a", "b"]):
            for turn in turns:
                # Re-entrant checkpointing needs an input with a gradient, as with PEFT.
                logits = model(**turn, use_cache=False).logits
            loss_of(logits).backward()
        states = [memory.states.pop(name) for name in "ab"]
        return states, [p.grad.clone() for p in memory.parameters()]

    states, gradients = run()
    if use_reentrant:
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    checkpointed_states, checkpointed_gradients = run()
    for a, b in zip(states, checkpointed_states, strict=True):
        assert a.utterances.tolist() == [2]
        assert_states_close(a, b, 1e-6)
    for a, b in zip(gradients, checkpointed_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
