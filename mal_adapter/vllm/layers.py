"""The decoder layers of a model that vLLM has built, and whether an adapter belongs to it."""

from operator import attrgetter
from typing import Any

from torch import nn

from mal_adapter.errors import ConfigError, HostError, HostMismatchError
from mal_adapter.serialization.metadata import AdapterMetadata

__all__ = ["check_host", "choose_layer", "decoder_layers"]

_PATHS = ("model.layers", "layers", "model.decoder.layers", "transformer.h")


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of the language model inside `model`.

    Raises:
        HostError: They are in none of the known places.
    """
    language_model = model.get_language_model() if hasattr(model, "get_language_model") else model
    for path in _PATHS:
        try:
            layers = attrgetter(path)(language_model)
        except AttributeError:
            continue
        if isinstance(layers, nn.ModuleList) and len(layers):
            return layers
    raise HostError(
        f"no decoder layers in {type(model).__name__}: its language model {type(language_model).__name__} has none of "
        f"{', '.join(_PATHS)}; serve this model with transformers (mal-adapter serve)"
    )


def choose_layer(layers: nn.ModuleList, metadata: AdapterMetadata) -> nn.Module:
    """The layer at which the adapter was trained.

    Raises:
        ConfigError: The adapter names none.
        HostError: This process does not have the layer.
    """
    index = metadata.layer_idx
    if index is None:
        raise ConfigError("the adapter names no layer_idx: it was not trained; set adapter.metadata before saving it")
    if not 0 <= index < len(layers) or "PPMissing" in type(layers[index]).__name__:
        raise HostError(f"layer {index} of the adapter is not among the {len(layers)} decoder layers in this process")
    return layers[index]


def check_host(metadata: AdapterMetadata, hidden_size: int | None, hf_config: Any, text_config: Any) -> None:
    """Raise `HostMismatchError` if an adapter was trained for another kind of host.

    Args:
        metadata: The adapter's.
        hidden_size: The width that it reads and writes.
        hf_config: The model's configuration, as transformers loads it.
        text_config: That of its language model.
    """
    thinker = getattr(hf_config, "thinker_config", hf_config)  # transformers attaches to the thinker of an omni model
    types = {hf_config.model_type, thinker.model_type}
    here = {"hidden_size": text_config.hidden_size, "num_hidden_layers": text_config.num_hidden_layers}
    trained = {"hidden_size": hidden_size, "num_hidden_layers": metadata.num_hidden_layers}
    wrong = [f"{name} {trained[name]}, not {here[name]}" for name in here if trained[name] not in (None, here[name])]
    if metadata.model_type is not None and metadata.model_type not in types:
        wrong.append(f"model_type {metadata.model_type}, not {hf_config.model_type}")
    if wrong:
        raise HostMismatchError(
            f"the adapter was trained on a host with {' and '.join(wrong)}; serve that host, or train an adapter for "
            "this one"
        )
