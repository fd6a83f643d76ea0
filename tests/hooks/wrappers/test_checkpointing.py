"""Gradient checkpointing in all its forms gives the states and the gradients of the run without it, and one write.

transformers 5.21 and newer checkpoint a layer's `forward`, inside of its hooks; older ones and torch's wrapper the
whole `__call__`, so that the layer's own hooks run again in backward.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mal_adapter import AttachedMemory, HostSpec, MemoryState, attach_memory
from mal_adapter.errors import HostError
from tests.hosts.builders import HOSTS, WIDTH, PlainHost, TinyHost
from tests.hosts.probes import assert_states_close, hook_census, random_adapter

LAYER = 1
REENTRANT = pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])


@pytest.fixture(params=["qwen2_audio", "voxtral", "phi4_multimodal"])
def host(request: pytest.FixtureRequest) -> TinyHost:
    return HOSTS[request.param]


@pytest.fixture
def model(host: TinyHost) -> PreTrainedModel:
    """In train mode, the layer's own weights trainable too, as in joint training."""
    model = host.build(num_layers=3).train().requires_grad_(False)
    host.layers(model)[LAYER].requires_grad_(True)
    model.enable_input_require_grads()  # re-entrant checkpoints need it, as PEFT's users know
    return model


def attach(model: nn.Module, **options: Any) -> AttachedMemory:
    return attach_memory(model, layer_idx=LAYER, adapter=random_adapter(), **options).train()


def train(host: TinyHost, model: PreTrainedModel, memory: AttachedMemory) -> tuple[MemoryState, dict[str, Tensor]]:
    """The state after two utterances, and the gradients of host and adapter of a loss over both."""
    prompts = [host.prompt([4], seed=1), host.prompt([5], seed=2), host.prompt([3], seed=3)]
    model.zero_grad()
    memory.adapter.zero_grad()
    loss = torch.zeros(())
    with memory.session("call"):
        for prompt in prompts:
            logits = model(**host.collate(model, [prompt])[0], use_cache=False).logits
            loss = loss + logits[:, -1].square().mean()
        loss.backward()
    named = [*memory.adapter.named_parameters(), *model.named_parameters()]
    gradients = {n.replace("_checkpoint_wrapped_module.", ""): p.grad.clone() for n, p in named if p.grad is not None}
    return memory.states["call"], gradients


def assert_same_run(plain: tuple[MemoryState, dict[str, Tensor]], other: tuple[MemoryState, dict[str, Tensor]]) -> None:
    assert other[0].utterances.tolist() == [3]
    assert_states_close(other[0], plain[0], 1e-6)
    assert plain[1].keys() == other[1].keys()
    assert any(name.endswith("q_proj.weight") or name.endswith("qkv_proj.weight") for name in plain[1])
    for name, gradient in plain[1].items():
        torch.testing.assert_close(other[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def hf_checkpointing(host: TinyHost, model: PreTrainedModel, use_reentrant: bool) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})


def torch_wrapper(host: TinyHost, model: PreTrainedModel, use_reentrant: bool) -> None:
    layers = host.layers(model)
    impl = CheckpointImpl.REENTRANT if use_reentrant else CheckpointImpl.NO_REENTRANT
    layers[LAYER] = checkpoint_wrapper(layers[LAYER], checkpoint_impl=impl)


@REENTRANT
@pytest.mark.parametrize("attach_first", [True, False], ids=["attach first", "checkpoint first"])
@pytest.mark.parametrize("checkpointing", [hf_checkpointing, torch_wrapper])
def test_trap_01_a_checkpointed_layer_gives_the_same_states_and_gradients(
    host: TinyHost,
    model: PreTrainedModel,
    checkpointing: Callable[[TinyHost, PreTrainedModel, bool], None],
    use_reentrant: bool,
    attach_first: bool,
):
    twin = copy.deepcopy(model)
    plain = train(host, twin, attach(twin))
    if not attach_first:
        checkpointing(host, model, use_reentrant)
    census = hook_census(model)
    memory = attach(model)
    if attach_first:
        checkpointing(host, model, use_reentrant)
    assert_same_run(plain, train(host, model, memory))
    memory.detach()
    if not attach_first:
        assert hook_census(model) == census


@REENTRANT
def test_checkpointing_goes_on_and_off_under_an_attached_memory(
    host: TinyHost, model: PreTrainedModel, use_reentrant: bool
):
    memory = attach(model)
    plain = train(host, model, memory)
    for _ in range(2):
        memory.states.clear()
        hf_checkpointing(host, model, use_reentrant)
        assert_same_run(plain, train(host, model, memory))
        memory.states.clear()
        model.gradient_checkpointing_disable()
        assert_same_run(plain, train(host, model, memory))


def checkpointing_functions(model: nn.Module) -> list[Any]:
    return [vars(module).get("_gradient_checkpointing_func") for module in model.modules()]


def test_detach_leaves_every_checkpointing_function_as_it_was(host: TinyHost, model: PreTrainedModel):
    """Also those of a layer that was wrapped under the memory."""
    hf_checkpointing(host, model, False)
    functions, layer = checkpointing_functions(model), host.layers(model)[LAYER]
    memory = attach(model)
    train(host, model, memory)
    torch_wrapper(host, model, False)
    memory.states.clear()
    train(host, model, memory)
    memory.detach()
    host.layers(model)[LAYER] = layer
    assert checkpointing_functions(model) == functions


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first in first out", "last in first out"])
def test_two_memories_leave_every_checkpointing_function_as_it_was(
    host: TinyHost, model: PreTrainedModel, order: tuple[int, int]
):
    """They wrap each other's stand-ins, in the modules that both go through."""
    hf_checkpointing(host, model, False)
    functions = checkpointing_functions(model)
    memories = [attach(model), attach_memory(model, layer_idx=2, adapter=random_adapter(seed=1)).train()]
    with memories[1].session("call"):
        train(host, model, memories[0])
    for index in order:
        memories[index].detach()
    assert checkpointing_functions(model) == functions


@REENTRANT
def test_two_memories_on_a_checkpointed_host(host: TinyHost, model: PreTrainedModel, use_reentrant: bool):
    runs = []
    for checkpointed in (False, True):
        twin = copy.deepcopy(model)
        other = attach_memory(twin, layer_idx=2, adapter=random_adapter(seed=1)).train()
        memory = attach(twin)
        if checkpointed:
            hf_checkpointing(host, twin, use_reentrant)
        with other.session("call"):
            runs.append(train(host, twin, memory))
        others = other.states["call"]
        memory.detach()
        other.detach()
        runs[-1][1].update({f"other.{n}": p.grad.clone() for n, p in other.adapter.named_parameters()})
    assert_same_run(*runs)
    assert others.utterances.tolist() == [3]


# ------------------------------------------------------------------------- models that checkpoint in their own loop


class OwnLoop(PlainHost):
    """The convention of older modeling files, remote code among them: the loop checkpoints each layer's `__call__`."""

    def __init__(self, use_reentrant: bool | None):
        super().__init__()
        self.gradient_checkpointing = use_reentrant is not None
        if self.gradient_checkpointing:
            self._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=use_reentrant)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        hidden_states = inputs_embeds
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                hidden_states = self._gradient_checkpointing_func(block.__call__, hidden_states)
            else:
                hidden_states = block(hidden_states)
        return self.head(hidden_states)


class WholeBlock(PlainHost):
    """A loop that checkpoints several layers at once."""

    def __init__(self, use_reentrant: bool):
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.head(checkpoint(nn.Sequential(*self.blocks), inputs_embeds, use_reentrant=self.use_reentrant))


def train_plain(model: PlainHost) -> tuple[MemoryState, list[Tensor]]:
    memory = attach(model.train(), host=HostSpec(layers="blocks", hidden_size=WIDTH))
    embeds = torch.randn(2, 1, 6, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.tensor([[False, True, True, True, True, False]])
    with memory.session("call", audio_mask=mask):
        loss = sum(model(utterance).square().mean() for utterance in embeds)
        loss.backward()
    return memory.states["call"], [p.grad for p in (*memory.parameters(), *model.parameters(), embeds)]


@REENTRANT
def test_a_loop_that_checkpoints_each_layers_call(use_reentrant: bool):
    state, gradients = train_plain(OwnLoop(None))
    checkpointed_state, checkpointed_gradients = train_plain(OwnLoop(use_reentrant))
    assert checkpointed_state.utterances.tolist() == [2]
    assert_states_close(checkpointed_state, state, 1e-6)
    for a, b in zip(checkpointed_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@REENTRANT
def test_a_checkpoint_around_several_layers_is_refused_and_writes_nothing(use_reentrant: bool):
    model = WholeBlock(use_reentrant)
    with pytest.raises(HostError, match="one by one"):
        train_plain(model)


def test_where_only_the_backward_can_tell_it_is_refused_there():
    """A memory in eval mode on a host in training: a re-entrant checkpoint looks like a host that never trains."""
    model = WholeBlock(use_reentrant=True).train()
    embeds = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.tensor([[False, True, True, True, True, False]])
    memory = attach(model, host=HostSpec(layers="blocks", hidden_size=WIDTH)).eval()
    with memory.session("call", audio_mask=mask):
        loss = model(embeds).square().mean()
        with pytest.raises(HostError, match="one by one"):
            loss.backward()
