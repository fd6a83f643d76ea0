"""LoRA beside a memory: PEFT calls the host's `forward` from a wrapper, replaces its linears, and merges them back."""

import copy
import itertools

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mal_adapter import AttachedMemory
from tests.hooks.wrappers.dialogue import Heard, Turn, assert_heard_alike, attach, hear, left_as_found, make_turns
from tests.hosts.builders import TinyHost
from tests.hosts.probes import hook_census, state_bytes

WHEN = pytest.mark.parametrize("attach_first", [True, False], ids=["attach first", "LoRA first"])


def lora(**options: object) -> peft.LoraConfig:
    """On attention and feed-forward of every layer; B is random instead of zero, so that LoRA is seen."""
    options = {"r": 2, "target_modules": ["o_proj", "down_proj"], "init_lora_weights": False} | options
    return peft.LoraConfig(**options)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def turns(host: TinyHost, model: PreTrainedModel) -> list[Turn]:
    return make_turns(host, model)


def heard_bare(model: PreTrainedModel, turns: list[Turn]) -> Heard:
    """By the host itself, under the memory that `attach` gives."""
    with torch.no_grad(), attach(copy.deepcopy(model)) as memory:
        assert memory._root is not None
        return hear(memory._root, memory, turns)


def with_lora(
    model: PreTrainedModel, attach_first: bool, **options: object
) -> tuple[peft.PeftModel, AttachedMemory, PreTrainedModel]:
    """The wrapped host, its memory, and a host without memory or wrapper that has LoRA in its weights."""
    memory = attach(model) if attach_first else None
    wrapped = peft.get_peft_model(model, lora(**options))
    merged = copy.deepcopy(wrapped).merge_and_unload()
    return wrapped, memory or attach(wrapped), merged


@WHEN
@torch.no_grad()
def test_a_lora_host_reads_and_writes_as_the_host_with_lora_in_its_weights(
    host: TinyHost, model: PreTrainedModel, turns: list[Turn], attach_first: bool
):
    without = heard_bare(model, turns)
    wrapped, memory, merged = with_lora(model, attach_first)
    expected = heard_bare(merged, turns)
    assert (expected.logits[-1] - without.logits[-1]).abs().max() > 1e-2
    assert memory.host.layers == host.layers_path
    assert_heard_alike(hear(wrapped, memory, turns), expected)
    with memory.session("generate"):
        for turn in turns:
            wrapped.generate(**turn, max_new_tokens=2, do_sample=False)
    generated = Heard(expected.logits, memory.states["generate"])
    assert_heard_alike(generated, expected)


@WHEN
@torch.no_grad()
def test_disable_adapter_switches_lora_off_and_the_memory_not(
    model: PreTrainedModel, turns: list[Turn], attach_first: bool
):
    without = heard_bare(model, turns)
    wrapped, memory, merged = with_lora(model, attach_first)
    with wrapped.disable_adapter():
        assert_heard_alike(hear(wrapped, memory, turns), without)
    assert_heard_alike(hear(wrapped, memory, turns), heard_bare(merged, turns))


@WHEN
@torch.no_grad()
def test_trap_11_the_memory_stays_through_merge_and_unload_and_goes_with_detach(
    model: PreTrainedModel, turns: list[Turn], attach_first: bool
):
    census = hook_census(model)
    wrapped, memory, merged = with_lora(model, attach_first)
    expected = heard_bare(merged, turns)
    wrapped.merge_adapter()
    assert_heard_alike(hear(wrapped, memory, turns), expected)
    wrapped.unmerge_adapter()
    assert_heard_alike(hear(wrapped, memory, turns), expected)
    unloaded = wrapped.merge_and_unload()
    assert_heard_alike(hear(unloaded, memory, turns), expected)
    memory.detach()
    assert unloaded is model
    assert hook_census(model) == census


@torch.no_grad()
def test_unload_gives_the_base_host_back_with_its_memory(model: PreTrainedModel, turns: list[Turn]):
    without = heard_bare(model, turns)
    wrapped, memory, _ = with_lora(model, attach_first=False)
    assert_heard_alike(hear(wrapped.unload(), memory, turns), without)


@torch.no_grad()
def test_attach_and_detach_leave_the_wrapped_host_and_its_files_alone(
    model: PreTrainedModel, turns: list[Turn], tmp_path
):
    wrapped = peft.get_peft_model(model, lora())
    saved = peft.get_peft_model_state_dict(wrapped)
    with left_as_found(wrapped), attach(wrapped) as memory:
        hear(wrapped, memory, turns)
        assert peft.get_peft_model_state_dict(wrapped).keys() == saved.keys()
        wrapped.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(wrapped.unload(), tmp_path)
    again = peft.get_peft_model_state_dict(reloaded)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], saved[name]) for name in saved)


@torch.no_grad()
def test_lora_adapters_take_turns_under_one_memory(model: PreTrainedModel, turns: list[Turn]):
    wrapped, memory, _ = with_lora(model, attach_first=True)
    wrapped.add_adapter("other", lora(r=3))
    wrapped.base_model.set_adapter("other")
    for name in ("default", "other"):
        wrapped.set_adapter(name)
        merged = copy.deepcopy(wrapped).merge_and_unload(adapter_names=[name])
        assert_heard_alike(hear(wrapped, memory, turns), heard_bare(merged, turns))


@WHEN
@torch.no_grad()
def test_lora_injected_by_transformers_or_for_mixed_types(
    model: PreTrainedModel, turns: list[Turn], attach_first: bool
):
    """`model.add_adapter` puts LoRA into the host without a wrapper; PEFT's mixed wrapper has no `get_base_model`."""
    for inject in ("transformers", "mixed"):
        torch.manual_seed(0)
        host_model = copy.deepcopy(model)
        merged = peft.get_peft_model(copy.deepcopy(model), lora()).merge_and_unload()
        torch.manual_seed(0)
        memory = attach(host_model) if attach_first else None
        if inject == "transformers":
            host_model.add_adapter(lora())
            wrapped: nn.Module = host_model
        else:
            wrapped = peft.get_peft_model(host_model, lora(), mixed=True)
        memory = memory or attach(wrapped)
        assert_heard_alike(hear(wrapped, memory, turns), heard_bare(merged, turns))


# --------------------------------------------------------------------------------------------------- joint training


def loss_of(model: nn.Module, memory: AttachedMemory, turns: list[Turn]) -> Tensor:
    return hear(model, memory, turns).logits[-1][:, -1].square().mean()


@WHEN
def test_one_optimizer_trains_lora_and_memory_and_neither_touches_the_base(
    model: PreTrainedModel, turns: list[Turn], attach_first: bool
):
    wrapped, memory, _ = with_lora(model, attach_first)
    memory.train()
    assert all(p.requires_grad for p in memory.parameters())  # PEFT freezes what it wraps, and this is not inside
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    trained |= dict(memory.adapter.named_parameters())
    base = {name: bytes_ for name, bytes_ in state_bytes(wrapped).items() if "lora_" not in name}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(itertools.chain(wrapped.parameters(), memory.parameters()), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = loss_of(wrapped, memory, turns)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in trained.items() if "audio" not in name)
    assert {name: bytes_ for name, bytes_ in state_bytes(wrapped).items() if "lora_" not in name} == base


def test_the_joint_gradient_is_the_slope(model: PreTrainedModel, turns: list[Turn]):
    """Of all LoRA and memory parameters along a random direction, against a central difference of a dialogue."""
    wrapped, memory, _ = with_lora(model.double(), attach_first=True)
    memory.train().adapter.double()
    turns = [{k: v.double() if v.is_floating_point() else v for k, v in turn.items()} for turn in turns]
    parameters = [p for p in (*wrapped.parameters(), *memory.parameters()) if p.requires_grad]
    gradients = torch.autograd.grad(loss_of(wrapped, memory, turns), parameters, allow_unused=True)
    pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
    directions = [torch.randn_like(p) for p, _ in pairs]
    norm = torch.stack([d.square().sum() for d in directions]).sum().sqrt()
    slope = sum((g * d).sum() for (_, g), d in zip(pairs, directions, strict=True)) / norm
    step, values = 1e-2, []  # hosts normalise in float32 whatever their dtype, so a smaller step drowns in rounding
    with torch.no_grad():
        for sign in (1, -2):
            for (p, _), d in zip(pairs, directions, strict=True):
                p.add_(d, alpha=float(sign * step / norm))
            values.append(loss_of(wrapped, memory, turns))
    scale = torch.stack([g.square().sum() for _, g in pairs]).sum().sqrt()
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), slope, rtol=0, atol=1e-3 * float(scale))


def test_loras_gradient_comes_through_what_it_let_the_memory_write(model: PreTrainedModel, turns: list[Turn]):
    """LoRA is recorded in the first utterance only, the loss is the second's: only the memory joins them."""
    wrapped, memory, _ = with_lora(model, attach_first=False)
    memory.train()
    before = [p for name, p in wrapped.named_parameters() if "lora_" in name and ".layers.0." in name]
    assert before
    for write in (True, False):
        with memory.session(write=write):
            wrapped(**turns[0])
            wrapped.requires_grad_(False)
            loss = wrapped(**turns[1]).logits[:, -1].square().mean()
        for p in before:
            p.requires_grad_(True)
        gradients = torch.autograd.grad(loss, before, allow_unused=True)
        assert all((g is not None and g.abs().max() > 1e-8) == write for g in gradients)
