"""`Host`: a model whose decoder layers, width and audio positions are known."""

import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from mal_adapter.errors import BaseModelWarning, ConfigError, HostMismatchError
from mal_adapter.hosts.detect import (
    FEATURE_ARGUMENTS,
    complete_from_registry,
    count_shared_layers,
    find_audio_token_id,
    find_hidden_size,
    find_layers,
    find_mask_module,
    unwrap,
)
from mal_adapter.hosts.spec import HostSpec
from mal_adapter.serialization.metadata import AdapterMetadata

__all__ = ["Host", "detect_host"]


@dataclasses.dataclass(frozen=True, eq=False)
class Host:
    """An audio language model, resolved once: everything that attaching a memory has to know about it.

    Attributes:
        model: The host without PEFT, torch.compile, DDP or FSDP wrappers and, of an omni model, its `.thinker`.
        spec: Its description, completed by detection.
        layers_path: Dotted path of the decoder layers in `model`.
        layers: The decoder layers.
        hidden_size: Width of the hidden states between them.
        shared_layers: How many of the last layers reuse the keys and values of earlier ones.

    Example:
        >>> from transformers import Qwen2Config, Qwen2ForCausalLM
        >>> tiny = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
        >>> host = Host.resolve(Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=2, vocab_size=100, **tiny)))
        >>> host.layers_path, len(host.layers), host.hidden_size
        ('model.layers', 2, 32)
    """

    model: nn.Module
    spec: HostSpec
    layers_path: str
    layers: nn.ModuleList
    hidden_size: int
    shared_layers: int

    @classmethod
    def resolve(cls, model: nn.Module, spec: HostSpec | None = None) -> "Host":
        """Find out what `spec` leaves open, by the registry, the config and the structure of `model`.

        Raises:
            HostError: `model` is not a module, or its decoder layers or their width can't be determined. The message
                lists what was found.
        """
        model = unwrap(model)
        known = complete_from_registry(model, spec)
        path, layers = find_layers(model, known.layers)
        features = known.feature_arguments or FEATURE_ARGUMENTS
        hidden_size = known.hidden_size or find_hidden_size(model, path)
        spec = dataclasses.replace(
            known,
            layers=path,
            hidden_size=hidden_size,
            audio_token_id=find_audio_token_id(model) if known.audio_token_id is None else known.audio_token_id,
            mask_module=find_mask_module(model, path, features) if known.mask_module is None else known.mask_module,
            feature_arguments=features,
        )
        return cls(model, spec, path, layers, hidden_size, count_shared_layers(model))

    def choose_layer(self, layer_idx: int | None, trained: int | None = None, *, has_adapter: bool = False) -> int:
        """The index of the decoder layer that carries the memory.

        Args:
            layer_idx: The user's choice; None takes `trained`.
            trained: The layer that the adapter was trained at, if it was trained.
            has_adapter: Whether there is an adapter already, for the message where both layers are None.

        Raises:
            ConfigError: There is no such layer, it can't carry a memory, or it is not the adapter's.
        """
        last = len(self.layers) - self.shared_layers - 1
        if layer_idx is None:
            layer_idx = trained
        if layer_idx is None and has_adapter:
            raise ConfigError(
                "the adapter does not record the layer that it was trained at, because it was saved without ever being "
                f"attached; pass layer_idx, 0 … {last}, or record it once: adapter.metadata = "
                "dataclasses.replace(adapter.metadata, layer_idx=…) and adapter.save_pretrained(folder)"
            )
        if layer_idx is None:
            middle = (last + 1) // 2
            raise ConfigError(f"a fresh memory needs layer_idx, 0 … {last}; a layer around {middle} is a good start")
        if isinstance(layer_idx, bool) or not isinstance(layer_idx, int) or not 0 <= layer_idx < len(self.layers):
            hint = "; a trained memory is given as adapter=" if isinstance(layer_idx, str | os.PathLike) else ""
            raise ConfigError(f"layer_idx={layer_idx!r} is not a decoder layer of this host, 0 … {last}{hint}")
        if trained not in (None, layer_idx):
            raise ConfigError(
                f"the adapter was trained at layer {trained}, and layer_idx={layer_idx} is another one; leave "
                "layer_idx out, or set the layer_idx of adapter.metadata to None first"
            )
        if layer_idx > last:
            raise ConfigError(
                f"layer_idx={layer_idx} is one of the last {self.shared_layers} layers, which reuse the keys and "
                f"values of earlier ones, so a memory there reaches no other token; choose 0 … {last}"
            )
        return layer_idx

    def check_adapter(self, metadata: AdapterMetadata, hidden_size: int | None) -> None:
        """Raise `HostMismatchError` if an adapter was trained for another kind of host; warn if for another checkpoint.

        Args:
            metadata: The adapter's.
            hidden_size: The width that it reads and writes.
        """
        if hidden_size != self.hidden_size:
            raise HostMismatchError(
                f"the adapter is for layers {hidden_size} wide, the host's are {self.hidden_size} wide; "
                "attach it to the kind of host that it was trained on, or train one for this host"
            )
        own = self.describe(AdapterMetadata(), layer_idx=None)
        for name in ("model_type", "num_hidden_layers"):
            trained, here = getattr(metadata, name), getattr(own, name)
            if trained is not None and here is not None and trained != here:
                raise HostMismatchError(
                    f"the adapter was trained on a host with {name} {trained!r}, this one has {here!r}; load that "
                    "host, or train an adapter for this one"
                )
        trained, here = metadata.base_model_name_or_path, own.base_model_name_or_path
        if trained and here and trained.rpartition("/")[2] != here.rpartition("/")[2]:
            warnings.warn(
                f"the adapter was trained on {trained}, this host is {here}; it works, but expect worse results",
                BaseModelWarning,
                stacklevel=3,
            )

    def describe(self, metadata: AdapterMetadata, layer_idx: int | None) -> AdapterMetadata:
        """`metadata` with this host and layer where it names none."""
        name = str(getattr(self.model, "name_or_path", "") or "")
        own: dict[str, Any] = {
            "base_model_name_or_path": (Path(name).name if Path(name).is_dir() else name) or None,
            "model_type": getattr(getattr(self.model, "config", None), "model_type", None),
            "hidden_size": self.hidden_size,
            "num_hidden_layers": len(self.layers),
            "layer_idx": layer_idx,
        }
        return dataclasses.replace(metadata, **{k: v for k, v in own.items() if getattr(metadata, k) is None})


def detect_host(model: nn.Module, spec: HostSpec | None = None) -> HostSpec:
    """The description that `attach_memory` works with: `spec`, completed by detection.

    Raises:
        HostError: The decoder layers or their width can't be determined; the message lists what was found.
    """
    return Host.resolve(model, spec).spec
