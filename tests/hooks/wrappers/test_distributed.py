"""DDP and FSDP of host and memory: two gloo processes answer and learn as one does.

Each rank hears dialogues of its own. The adapter is small, so it stays whole on every rank; under FSDP2 it is outside
of what is sharded, and its gradients are averaged by hand or by a DDP that holds nothing else.
"""

import copy
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from mal_adapter import AttachedMemory
from tests.hooks.wrappers.dialogue import Turn, assert_heard_alike, attach, hear, make_turns
from tests.hooks.wrappers.listener import Listener
from tests.hosts.builders import HOSTS, TinyHost
from tests.hosts.probes import assert_states_close

RANKS = 2


def run_on_two(function: Callable[..., None], tmp_path: Path, *args: object) -> None:
    """`function(rank, *args)` in two processes of one group; an exception in either is raised here."""
    # The server imports torch and this file once, and each process is a fork of it.
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(
        _in_group, (str(tmp_path / "rendezvous"), function, args), nprocs=RANKS, start_method="forkserver"
    )


def _in_group(rank: int, rendezvous: str, function: Callable[..., None], args: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------- a sharded host answers


def shard(host: TinyHost, model: PreTrainedModel, root: nn.Module | None = None) -> nn.Module:
    """FSDP2, as its documentation does it: each decoder layer, then the rest of `root`, which is the model itself
    unless given."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in host.layers(model):
        fully_shard(layer, mesh=mesh)
    return fully_shard(root or model, mesh=mesh)


def shard_fsdp1(host: TinyHost, model: PreTrainedModel) -> nn.Module:
    policy = ModuleWrapPolicy({type(host.layers(model)[0])})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


def answers_as_unsharded(rank: int, name: str, sharding: Callable[[TinyHost, PreTrainedModel], nn.Module]) -> None:
    host = HOSTS[name]
    plain = host.build(num_layers=3).requires_grad_(False)
    turns = make_turns(host, plain, seed=rank)
    with torch.no_grad(), attach(plain) as memory:
        expected = hear(plain, memory, turns)
    for attach_first in (True, False):
        model = copy.deepcopy(plain)
        memory = attach(model) if attach_first else None
        sharded = sharding(host, model)
        memory = memory or attach(sharded)
        with torch.no_grad():
            assert_heard_alike(hear(sharded, memory, turns), expected)
        if sharding is shard:
            with torch.no_grad(), memory.session("generated"):
                for turn in turns:
                    sharded.generate(**turn, max_new_tokens=2, do_sample=False)
            assert_states_close(memory.states["generated"], expected.state)
            whole = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
            assert rank or all(torch.equal(whole[key], value) for key, value in plain.state_dict().items())
        memory.detach()


@pytest.mark.parametrize("name", ["qwen2_audio", "phi4_multimodal"])
def test_a_host_under_fsdp2_answers_as_the_unsharded_one(name: str, tmp_path: Path):
    run_on_two(answers_as_unsharded, tmp_path, name, shard)


def test_a_host_under_fsdp1_answers_as_the_unsharded_one(tmp_path: Path):
    run_on_two(answers_as_unsharded, tmp_path, "qwen2_audio", shard_fsdp1)


# ------------------------------------------------------------------------------------------------ and two ranks learn


def batch(host: TinyHost, model: PreTrainedModel, rows: range) -> tuple[list[Turn], Tensor]:
    """Three utterances of the dialogues `rows`, and a label for each."""
    turns = [
        host.collate(model, [host.prompt([4 + turn], seed=10 * row + turn) for row in rows])[0] for turn in range(3)
    ]
    return turns, torch.tensor([[row + 1, row + 2, row + 3] for row in rows])


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_alike(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        torch.testing.assert_close(whole, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def average_by_hand(memory: AttachedMemory) -> None:
    for parameter in memory.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= RANKS


def in_ddp_with_the_host(host: TinyHost, model: PreTrainedModel) -> tuple[AttachedMemory, nn.Module]:
    memory = attach(model).train()
    return memory, DistributedDataParallel(Listener(model, memory))


def in_fsdp2_with_the_host(host: TinyHost, model: PreTrainedModel) -> tuple[AttachedMemory, nn.Module]:
    """The adapter is in the root's group, which is whole during the root's forward."""
    memory = attach(model).train()
    return memory, shard(host, model, root=Listener(model, memory))


def in_ddp_beside_a_sharded_host(host: TinyHost, model: PreTrainedModel) -> tuple[AttachedMemory, nn.Module]:
    """A bound method is no submodule: what DDP sees is the adapter."""
    memory = attach(shard(host, model)).train()
    return memory, DistributedDataParallel(Listener(model.__call__, memory))


def by_hand_beside_a_sharded_host(host: TinyHost, model: PreTrainedModel) -> tuple[AttachedMemory, nn.Module]:
    memory = attach(shard(host, model)).train()
    return memory, Listener(model, memory)


Wrap = Callable[[TinyHost, PreTrainedModel], tuple[AttachedMemory, nn.Module]]
WAYS: list[Wrap] = [
    in_ddp_with_the_host,
    in_fsdp2_with_the_host,
    in_ddp_beside_a_sharded_host,
    by_hand_beside_a_sharded_host,
]


def learns_as_one_process(rank: int, wrap: Wrap) -> None:
    host = HOSTS["qwen2_audio"]
    model = host.build(num_layers=3).requires_grad_(False)
    plain = copy.deepcopy(model)
    memory = attach(plain).train()
    Listener(plain, memory)(*batch(host, model, range(2 * RANKS))).backward()
    expected = gradients_of(memory.adapter)

    memory, listener = wrap(host, model)
    listener(*batch(host, model, range(2 * rank, 2 * rank + 2))).backward()
    if wrap is by_hand_beside_a_sharded_host:
        average_by_hand(memory)
    assert_alike(gradients_of(memory.adapter), expected)


@pytest.mark.parametrize("wrap", WAYS)
def test_two_ranks_learn_what_one_process_learns_from_all_dialogues(tmp_path: Path, wrap: Wrap):
    run_on_two(learns_as_one_process, tmp_path, wrap)


def joins_dialogues_of_unlike_length(rank: int) -> None:
    host = HOSTS["qwen2_audio"]
    model = host.build(num_layers=3).requires_grad_(False)
    memory, listener = in_ddp_with_the_host(host, model)
    for step in range(3):
        turns, labels = batch(host, model, range(2 * rank, 2 * rank + 2))
        utterances = 1 + (rank + step) % 3
        memory.adapter.zero_grad()
        listener(turns[:utterances], labels[:, :utterances]).backward()
        gradients = torch.cat([gradient.flatten() for gradient in gradients_of(memory.adapter).values()])
        of_all = [torch.empty_like(gradients) for _ in range(RANKS)]
        dist.all_gather(of_all, gradients)
        assert torch.equal(*of_all)


def test_ranks_may_hear_dialogues_of_unlike_length(tmp_path: Path):
    """DDP waits for every parameter's gradient on every rank; a dialogue of one utterance has them all."""
    run_on_two(joins_dialogues_of_unlike_length, tmp_path)


def learns_lora_and_memory(rank: int) -> None:
    """DDP holds the host with its LoRA; the memory is attached to that, and averages its own gradients by hand."""
    host = HOSTS["qwen2_audio"]
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    model = peft.get_peft_model(host.build(num_layers=3), lora)
    plain = copy.deepcopy(model)
    memory = attach(plain).train()
    Listener(plain, memory)(*batch(host, model, range(2 * RANKS))).backward()
    expected = gradients_of(memory.adapter), gradients_of(plain)

    wrapped = DistributedDataParallel(model)
    memory = attach(wrapped).train()
    Listener(wrapped, memory)(*batch(host, model, range(2 * rank, 2 * rank + 2))).backward()
    average_by_hand(memory)
    assert_alike(gradients_of(memory.adapter), expected[0])
    assert_alike(gradients_of(model), expected[1])


def test_lora_and_memory_learn_together_under_ddp(tmp_path: Path):
    run_on_two(learns_lora_and_memory, tmp_path)
