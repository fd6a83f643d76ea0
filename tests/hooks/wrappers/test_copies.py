"""Copies and files of a host with a memory: the copy is a host without one, and takes its own."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from mal_adapter import AttachedMemory, MemoryAdapter
from mal_adapter.errors import AudioOutsideSessionWarning
from tests.hooks.wrappers.dialogue import Turn, assert_heard_alike, attach, hear, make_turns
from tests.hosts.builders import TinyHost
from tests.hosts.probes import assert_states_close, hook_census, same_bits, state_bytes


def through_a_file(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def averaged(model: nn.Module) -> nn.Module:
    return AveragedModel(model).module


WAYS = pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_a_file, averaged],
    ids=["deepcopy", "pickle", "torch.save", "AveragedModel"],
)
Duplicate = Callable[[PreTrainedModel], PreTrainedModel]


@pytest.fixture
def turns(host: TinyHost, model: PreTrainedModel) -> list[Turn]:
    return make_turns(host, model)


@pytest.fixture
def memory(model: PreTrainedModel) -> AttachedMemory:
    return attach(model)


@WAYS
@torch.no_grad()
def test_a_copy_made_inside_a_session_is_bare_and_the_dialogue_goes_on_in_the_original(
    model: PreTrainedModel, turns: list[Turn], duplicate: Duplicate
):
    bare = [model(**turn).logits for turn in turns]
    weights = state_bytes(model)
    memory = attach(model)
    expected = hear(model, memory, turns)
    with memory.session("call"), warnings.catch_warnings():
        warnings.simplefilter("ignore", AudioOutsideSessionWarning)
        model(**turns[0])
        twin = duplicate(model)
        for turn, logits in zip(turns, bare, strict=True):
            assert same_bits(twin(**turn).logits, logits)
        model(**turns[1])
        model(**turns[2])
    assert_states_close(memory.states["call"], expected.state, 0)
    assert state_bytes(twin) == weights


@WAYS
@torch.no_grad()
def test_trap_12_a_copied_or_pickled_host_takes_a_memory_of_its_own_and_gives_it_back(
    model: PreTrainedModel, turns: list[Turn], duplicate: Duplicate
):
    """The copied hooks belong to no memory that anyone could detach."""
    census = hook_census(model)
    memory = attach(model)
    expected = hear(model, memory, turns)
    twin = duplicate(model)
    own = attach(twin)
    assert own.adapter is not memory.adapter
    memory.detach()
    assert_heard_alike(hear(twin, own, turns), expected, 0)
    assert list(memory.states) == []
    own.detach()
    assert hook_census(twin) == census


@torch.no_grad()
def test_copies_of_copies_carry_no_heap_of_hooks(model: PreTrainedModel, turns: list[Turn]):
    census = None
    for _ in range(3):
        memory = attach(model)
        expected = hear(model, memory, turns)
        census = census or hook_census(model)
        assert hook_census(model) == census
        model = pickle.loads(pickle.dumps(model))
    assert_heard_alike(hear(model, attach(model), turns), expected, 0)


@torch.no_grad()
def test_a_file_is_loaded_by_a_process_that_numbers_its_hooks_anew(
    model: PreTrainedModel, turns: list[Turn], monkeypatch: pytest.MonkeyPatch
):
    """Torch numbers hooks per process and keeps their options by number; what was dropped must leave none behind."""
    first = RemovableHandle.next_id
    memory = attach(model)
    expected = hear(model, memory, turns)
    data = pickle.dumps(model)
    for number in range(first, RemovableHandle.next_id):
        with monkeypatch.context() as process:
            process.setattr(RemovableHandle, "next_id", number)
            twin = pickle.loads(data)
            assert_heard_alike(hear(twin, attach(twin), turns), expected, 0)


@WAYS
def test_a_host_in_training_can_be_copied_between_forward_and_backward(
    model: PreTrainedModel, memory: AttachedMemory, turns: list[Turn], duplicate: Duplicate
):
    """Deepcopy and pickle refuse tensors inside a graph, and the session's state is one."""
    model.requires_grad_(False)
    memory.train()
    with memory.session("call"):
        model(**turns[0], use_cache=False)
        twin = duplicate(model)
        model(**turns[1], use_cache=False).logits.square().mean().backward()
    assert all(p.grad is not None for p in memory.parameters())
    assert all(p.grad is None for p in twin.parameters())


@torch.no_grad()
def test_checkpoint_files_are_those_of_the_bare_host(model: PreTrainedModel, turns: list[Turn], tmp_path: Path):
    """`save_pretrained`, and a `state_dict` that loads with weights only."""
    weights = state_bytes(model)
    model.save_pretrained(tmp_path / "bare")
    with attach(model) as memory:
        hear(model, memory, turns)
        model.save_pretrained(tmp_path / "attached")
        torch.save(model.state_dict(), tmp_path / "state.pt")
    files = sorted(path.name for path in (tmp_path / "bare").iterdir())
    assert sorted(path.name for path in (tmp_path / "attached").iterdir()) == files
    for name in files:
        a, b = (tmp_path / folder / name for folder in ("bare", "attached"))
        if name.endswith(".safetensors"):
            x, y = load_file(a), load_file(b)
            assert x.keys() == y.keys()
            assert all(same_bits(x[key], y[key]) for key in x)
        else:
            assert a.read_bytes() == b.read_bytes(), name
    assert not model.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True)).missing_keys
    assert state_bytes(model) == weights


@torch.no_grad()
def test_weights_loaded_under_a_memory_are_the_ones_it_hears(host: TinyHost, model: PreTrainedModel, turns: list[Turn]):
    other = host.build(num_layers=3, seed=7)
    with attach(other) as memory:
        expected = hear(other, memory, turns)
    with attach(model) as memory:
        before = hear(model, memory, turns)
        model.load_state_dict(other.state_dict())
        heard = hear(model, memory, turns)
    assert (before.logits[0] - heard.logits[0]).abs().max() > 1e-2
    assert_heard_alike(heard, expected, 0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_a_file])
@torch.no_grad()
def test_an_adapter_in_use_can_be_copied_and_goes_on_with_its_states(
    model: PreTrainedModel,
    memory: AttachedMemory,
    turns: list[Turn],
    duplicate: Callable[[MemoryAdapter], MemoryAdapter],
):
    with memory.session("call"):
        model(**turns[0])
    twin, state = duplicate(memory.adapter), memory.states["call"]
    utterance = torch.ones(1, 3, twin.config.hidden_size)
    assert twin.write(state, utterance).equals(memory.adapter.write(state, utterance))
