"""Whether an adapter fits a host, and which decoder layer carries the memory."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mal_adapter.errors import BaseModelWarning, ConfigError, HostMismatchError
from mal_adapter.hosts.spec import HostSpec
from mal_adapter.memory.adapter import MemoryAdapter

__all__ = ["check_host", "check_layer_idx", "host_facts"]


def check_host(adapter: MemoryAdapter, facts: Mapping[str, Any]) -> None:
    """Raise `HostMismatchError` if the adapter was trained for another kind of host; warn if for another checkpoint.

    Args:
        adapter: With its card.
        facts: What a card would say of this host.
    """
    if adapter.config.hidden_size != facts["hidden_size"]:
        raise HostMismatchError(
            f"the adapter is for layers {adapter.config.hidden_size} wide, the host's are {facts['hidden_size']} wide; "
            "attach it to the kind of host that it was trained on, or train one for this host"
        )
    for name in ("model_type", "num_hidden_layers"):
        trained, here = getattr(adapter.metadata, name), facts[name]
        if trained is not None and here is not None and trained != here:
            raise HostMismatchError(
                f"the adapter was trained on a host with {name} {trained!r}, this one has {here!r}; load that host, or "
                "train an adapter for this one"
            )
    trained, here = adapter.metadata.base_model_name_or_path, facts["base_model_name_or_path"]
    if trained and here and trained.rpartition("/")[2] != here.rpartition("/")[2]:
        warnings.warn(
            f"the adapter was trained on {trained}, this host is {here}; it works, but expect worse results",
            BaseModelWarning,
            stacklevel=3,
        )


def check_layer_idx(layer_idx: int | None, trained: int | None, num_layers: int, shared: int) -> int:
    """The decoder layer that is meant.

    Args:
        layer_idx: What the user gives.
        trained: Where the adapter was trained, if it was.
        num_layers: Of the host.
        shared: Its last layers that make no keys and values of their own.

    Raises:
        ConfigError: There is no such layer, it can't carry a memory, or it is not the adapter's.
    """
    own = num_layers - shared
    if layer_idx is None:
        layer_idx = trained
    if layer_idx is None:
        raise ConfigError(f"a fresh memory needs layer_idx, 0 … {own - 1}; a layer around {own // 2} is a good start")
    if isinstance(layer_idx, bool) or not isinstance(layer_idx, int) or not 0 <= layer_idx < num_layers:
        hint = "; a trained memory is given as adapter=" if isinstance(layer_idx, str | os.PathLike) else ""
        raise ConfigError(f"layer_idx={layer_idx!r} is not a decoder layer of this host, 0 … {own - 1}{hint}")
    if trained not in (None, layer_idx):
        raise ConfigError(
            f"the adapter was trained at layer {trained}, and layer_idx={layer_idx} is another one; leave layer_idx "
            "out, or set the layer_idx of adapter.metadata to None first"
        )
    if layer_idx >= own:
        raise ConfigError(
            f"layer_idx={layer_idx} is one of the last {shared} layers, which reuse the keys and values of earlier "
            f"ones, so that no token would hear a memory there; choose 0 … {own - 1}"
        )
    return layer_idx


def host_facts(root: nn.Module, spec: HostSpec, num_layers: int) -> dict[str, Any]:
    config = getattr(root, "config", None)
    name = str(getattr(root, "name_or_path", "") or "")
    return {
        "base_model_name_or_path": (Path(name).name if Path(name).is_dir() else name) or None,
        "model_type": getattr(config, "model_type", None),
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": num_layers,
    }
