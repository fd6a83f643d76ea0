"""The usual host, and one that keeps its features in the arguments of decode steps and has a flat config."""

import pytest
from transformers import PreTrainedModel

from tests.hosts.builders import HOSTS, TinyHost


@pytest.fixture(params=["qwen2_audio", "phi4_multimodal"])
def host(request: pytest.FixtureRequest) -> TinyHost:
    return HOSTS[request.param]


@pytest.fixture
def model(host: TinyHost) -> PreTrainedModel:
    return host.build(num_layers=3)
