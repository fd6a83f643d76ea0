"""HF Trainer on a module that holds host and adapter: it learns what a plain loop learns, and touches nothing else.

Trainer saves whatever it trains, the host included. So the adapter is saved by itself.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from mal_adapter import AttachedMemory, MemoryAdapter
from tests.hooks.wrappers.dialogue import Turn, assert_heard_alike, attach, hear, make_turns
from tests.hooks.wrappers.listener import Listener
from tests.hosts.builders import TinyHost
from tests.hosts.probes import state_bytes


class TrainableListener(Listener):
    """What Trainer wants of a forward: a mapping with the loss."""

    def forward(self, turns: list[Turn], labels: Tensor) -> dict[str, Tensor]:
        return {"loss": super().forward(turns, labels)}


class Dialogues(Dataset):
    """A whole dialogue per item, each of two utterances, already collated."""

    def __init__(self, host: TinyHost, model: nn.Module, count: int = 4) -> None:
        self.items = [
            {"turns": make_turns(host, model, clips=(4, 5), seed=seed), "labels": torch.tensor([[seed, seed + 1]])}
            for seed in range(count)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


class InOrder(Trainer):
    """Without shuffling, so that a plain loop can follow."""

    def _get_train_sampler(self, *_: Any) -> None:
        return None


def sgd(memory: AttachedMemory) -> torch.optim.Optimizer:
    return torch.optim.SGD(memory.parameters(), lr=0.1)


def train(
    listener: nn.Module, dialogues: Dialogues, optimizer: torch.optim.Optimizer, folder: Path, **options: Any
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        num_train_epochs=1,
        max_grad_norm=0,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **{"save_strategy": "no", "logging_strategy": "no"} | options,
    )
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    trainer = InOrder(
        model=listener,
        args=arguments,
        train_dataset=dialogues,
        data_collator=lambda items: items[0],
        optimizers=(optimizer, constant),
    )
    trainer.train()
    return trainer


@pytest.fixture
def dialogues(host: TinyHost, model: PreTrainedModel) -> Dialogues:
    return Dialogues(host, model)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_learns_what_a_plain_loop_learns(
    model: PreTrainedModel, dialogues: Dialogues, tmp_path: Path, accumulate: int
):
    model.requires_grad_(False)
    weights = state_bytes(model)
    plain = copy.deepcopy(model).train()
    looped = attach(plain).train()
    listener, optimizer = Listener(plain, looped), sgd(looped)
    for index, dialogue in enumerate(dialogues.items):
        (listener(**dialogue) / accumulate).backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()

    memory = attach(model)
    before = {name: p.detach().clone() for name, p in memory.adapter.named_parameters()}
    train(TrainableListener(model, memory), dialogues, sgd(memory), tmp_path, gradient_accumulation_steps=accumulate)
    assert memory.adapter.training
    for name, parameter in memory.adapter.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        torch.testing.assert_close(parameter, looped.adapter.get_parameter(name), rtol=1e-4, atol=1e-6, msg=name)
    assert state_bytes(model) == weights
    assert all(p.grad is None for p in model.parameters())


def test_trainer_under_bf16_autocast(model: PreTrainedModel, dialogues: Dialogues, tmp_path: Path):
    model.requires_grad_(False)
    memory = attach(model)
    train(TrainableListener(model, memory), dialogues, sgd(memory), tmp_path, bf16=True)
    assert {p.dtype for p in memory.parameters()} == {torch.float32}
    assert all(p.isfinite().all() for p in memory.parameters())
    state = memory.states["0"]
    assert {t.dtype for t in (*state.weights, *state.momentum)} == {torch.float32}


def test_what_trainer_trained_is_saved_and_heard_again(
    host: TinyHost, model: PreTrainedModel, dialogues: Dialogues, tmp_path: Path
):
    model.requires_grad_(False)
    twin = copy.deepcopy(model)
    memory = attach(model)
    trainer = train(TrainableListener(model, memory), dialogues, sgd(memory), tmp_path / "run", save_strategy="epoch")
    assert list((tmp_path / "run").glob("checkpoint-*/*.safetensors"))
    memory.adapter.save_pretrained(tmp_path / "adapter")
    trainer.model.eval()
    memory.eval()
    turns = make_turns(host, model)
    with torch.no_grad():
        expected = hear(model, memory, turns)
        loaded = attach(twin, None, adapter=MemoryAdapter.from_pretrained(tmp_path / "adapter"))
        assert_heard_alike(hear(twin, loaded, turns), expected)
