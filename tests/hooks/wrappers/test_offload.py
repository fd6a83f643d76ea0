"""Hosts whose layers are elsewhere: accelerate's dispatch, CPU and disk offload, `device_map` of from_pretrained.

An offloaded layer's parameters are on `meta` between its forwards, where the adapter must not follow. The audio parts
stay on the CPU: both hosts look at those parts' weights from outside, so without a memory too they fail on `meta`.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor
from transformers import PreTrainedModel

from mal_adapter import AttachedMemory
from tests.hooks.wrappers.dialogue import LAYER, Heard, Turn, assert_heard_alike, attach, hear, make_turns
from tests.hosts.builders import TinyHost
from tests.hosts.probes import hook_census

WHEN = pytest.mark.parametrize("attach_first", [True, False], ids=["attach first", "offload first"])


@pytest.fixture
def turns(host: TinyHost, model: PreTrainedModel) -> list[Turn]:
    return make_turns(host, model)


@pytest.fixture
def expected(model: PreTrainedModel, turns: list[Turn]) -> Heard:
    with torch.no_grad(), attach(model) as memory:
        return hear(model, memory, turns)


def device_map(host: TinyHost, model: PreTrainedModel) -> dict[str, str]:
    """The decoder layers on disk, every other module with tensors of its own on the CPU."""
    others = [name for name, module in model.named_modules() if module._parameters or module._buffers]
    return {name: "cpu" for name in others if not name.startswith(host.layers_path)} | {host.layers_path: "disk"}


def assert_offloaded(host: TinyHost, model: PreTrainedModel) -> None:
    assert {p.device.type for p in host.layers(model)[LAYER].parameters()} == {"meta"}


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def checkpoint(model: PreTrainedModel, tmp_path: Path) -> Path:
    """Several shards of safetensors."""
    folder = tmp_path / "host"
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def generated(model: PreTrainedModel, memory: AttachedMemory, turns: list[Turn], expected: Heard) -> Heard:
    with memory.session("generated"):
        for turn in turns:
            model.generate(**turn, max_new_tokens=2, do_sample=False)
    return Heard(expected.logits, memory.states["generated"])


@torch.no_grad()
def test_device_map_auto(model: PreTrainedModel, turns: list[Turn], expected: Heard, checkpoint: Path):
    loaded = type(model).from_pretrained(checkpoint, device_map="auto")
    assert_heard_alike(hear(loaded, attach(loaded), turns), expected, 0)


@pytest.mark.parametrize("host", ["qwen2_audio"], indirect=True)  # the other's last parts are the audio's
@torch.no_grad()
def test_device_map_auto_where_memory_is_short(
    host: TinyHost, model: PreTrainedModel, turns: list[Turn], expected: Heard, checkpoint: Path, tmp_path: Path
):
    """What does not fit stays on disk."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    loaded = type(model).from_pretrained(
        checkpoint, device_map="auto", max_memory={"cpu": int(0.6 * size)}, offload_folder=tmp_path / "offload"
    )
    assert_offloaded(host, loaded)
    memory = attach(loaded)
    assert_heard_alike(hear(loaded, memory, turns), expected, 0)
    assert_heard_alike(generated(loaded, memory, turns, expected), expected)


@torch.no_grad()
def test_a_device_map_with_layers_on_disk(
    host: TinyHost, model: PreTrainedModel, turns: list[Turn], expected: Heard, checkpoint: Path
):
    loaded = type(model).from_pretrained(checkpoint, device_map=device_map(host, model))
    assert_offloaded(host, loaded)
    census = hook_census(loaded)
    memory = attach(loaded)
    assert_heard_alike(hear(loaded, memory, turns), expected, 0)
    assert_heard_alike(generated(loaded, memory, turns, expected), expected)
    memory.detach()
    assert hook_census(loaded) == census
    assert_offloaded(host, loaded)


# -------------------------------------------------------------------------------------------------------- accelerate


def dispatch(host: TinyHost, model: PreTrainedModel, folder: Path) -> None:
    dispatch_model(model, device_map=device_map(host, model), offload_dir=folder)


def to_cpu(host: TinyHost, model: PreTrainedModel, folder: Path) -> None:
    cpu_offload(host.layers(model), execution_device=torch.device("cpu"))


def to_disk(host: TinyHost, model: PreTrainedModel, folder: Path) -> None:
    disk_offload(host.layers(model), folder, execution_device=torch.device("cpu"))


Offload = Callable[[TinyHost, PreTrainedModel, Path], None]
OFFLOAD = pytest.mark.parametrize("offload", [dispatch, to_cpu, to_disk])


@WHEN
@OFFLOAD
@torch.no_grad()
def test_trap_10_an_offloaded_host_reads_and_writes_as_before(
    host: TinyHost,
    model: PreTrainedModel,
    turns: list[Turn],
    expected: Heard,
    tmp_path: Path,
    offload: Offload,
    attach_first: bool,
):
    memory = attach(model) if attach_first else None
    offload(host, model, tmp_path)
    assert_offloaded(host, model)
    memory = memory or attach(model)
    assert_heard_alike(hear(model, memory, turns), expected, 0)
    assert_offloaded(host, model)
    assert {p.device.type for p in memory.parameters()} == {"cpu"}
    remove_hook_from_submodules(model)
    assert_heard_alike(hear(model, memory, turns), expected, 0)


@OFFLOAD
def test_a_memory_trains_on_an_offloaded_host(
    host: TinyHost, model: PreTrainedModel, turns: list[Turn], tmp_path: Path, offload: Offload
):
    model.requires_grad_(False)
    memory = attach(model).train()

    def gradients() -> list[Tensor]:
        memory.adapter.zero_grad()
        hear(model, memory, turns).logits[-1].square().mean().backward()
        return [p.grad.clone() for p in memory.parameters() if p.grad is not None]

    in_memory = gradients()
    offload(host, model, tmp_path)
    for a, b in zip(gradients(), in_memory, strict=True):
        assert torch.equal(a, b)
