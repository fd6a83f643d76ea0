"""Where the decoder layers of vLLM's models are, and which adapter belongs to them."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from mal_adapter.errors import ConfigError, HostError, HostMismatchError
from mal_adapter.serialization.metadata import AdapterMetadata
from mal_adapter.vllm.layers import check_host, choose_layer, decoder_layers


class Tree(nn.Module):
    """A module with the given children."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class AudioModel(Tree):
    def get_language_model(self) -> nn.Module:
        return self.get_submodule("language_model")


def layers(count: int = 3) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(1, 1) for _ in range(count))


@pytest.mark.parametrize("path", ["model.layers", "layers", "model.decoder.layers", "transformer.h"])
def test_layers_are_found_in_the_language_model(path: str):
    found: Any = (expected := layers())
    for name in reversed(path.split(".")):
        found = Tree(**{name: found})
    assert decoder_layers(found) is expected
    assert decoder_layers(AudioModel(audio_tower=Tree(layers=layers()), language_model=found)) is expected


def test_a_model_without_them_is_refused():
    with pytest.raises(HostError, match="serve this model with transformers"):
        decoder_layers(Tree(blocks=layers()))


class PPMissingLayer(nn.Identity):
    """vLLM's name for a layer that another pipeline rank has."""


def test_the_adapters_layer_is_taken():
    found = layers()
    assert choose_layer(found, AdapterMetadata(layer_idx=1)) is found[1]
    with pytest.raises(ConfigError, match="layer_idx"):
        choose_layer(found, AdapterMetadata())
    for index in (3, -1):
        with pytest.raises(HostError, match="not among the 3"):
            choose_layer(found, AdapterMetadata(layer_idx=index))
    found[1] = PPMissingLayer()
    with pytest.raises(HostError, match="in this process"):
        choose_layer(found, AdapterMetadata(layer_idx=1))


TEXT = SimpleNamespace(hidden_size=64, num_hidden_layers=4)
OMNI = SimpleNamespace(model_type="omni", thinker_config=SimpleNamespace(model_type="omni_thinker"))


@pytest.mark.parametrize("model_type", ["omni", "omni_thinker", None])
def test_an_adapter_of_this_host_passes(model_type: str | None):
    check_host(AdapterMetadata(model_type=model_type, num_hidden_layers=4), 64, OMNI, TEXT)


@pytest.mark.parametrize(
    ("metadata", "width", "problem"),
    [
        (AdapterMetadata(), 32, "hidden_size 32, not 64"),
        (AdapterMetadata(num_hidden_layers=5), 64, "num_hidden_layers 5, not 4"),
        (AdapterMetadata(model_type="qwen2_audio"), 64, "model_type qwen2_audio, not omni"),
    ],
)
def test_an_adapter_of_another_host_is_refused(metadata: AdapterMetadata, width: int, problem: str):
    with pytest.raises(HostMismatchError, match=re.escape(problem)):
        check_host(metadata, width, OMNI, TEXT)
