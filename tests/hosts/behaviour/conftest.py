"""A host of three layers, and one in training."""

import pytest
from torch import nn
from transformers import PreTrainedModel

from tests.hosts.behaviour.common import attach
from tests.hosts.builders import TinyHost


@pytest.fixture
def model(host: TinyHost) -> PreTrainedModel:
    return host.build(num_layers=3)


@pytest.fixture
def trained(host: TinyHost, model: PreTrainedModel):
    """A frozen host and a trainable memory, both in train mode, and two dialogues of two utterances."""
    model.requires_grad_(False).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()  # in train mode the host changes its running statistics, even if frozen
    memory = attach(model)
    memory.train()
    turns = [host.collate(model, [host.prompt([6], seed=1), host.prompt([5], seed=2)])[0],
             host.collate(model, [host.prompt([4], seed=3), host.prompt([7], seed=4)])[0]]  # fmt: skip
    return model, memory, turns
