"""What `attach_memory` and a session's beginning check in their arguments, and the errors that say what to give."""

import inspect
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mal_adapter.adapter import MemoryAdapter
from mal_adapter.errors import AudioMaskError, BaseModelWarning, ConfigError, HostMismatchError, SessionError
from mal_adapter.stores import InMemoryStore, SessionStore, open_store
from mal_adapter.stores.checks import id_bytes

__all__ = ["check_audio_mask", "check_host", "check_layer_idx", "check_session_ids", "check_store"]


def check_session_ids(session_id: str | Sequence[str]) -> list[str]:
    """The ids of one session, one per prompt of the batch."""
    several = not isinstance(session_id, str) and isinstance(session_id, Iterable)
    if isinstance(session_id, set | frozenset):
        raise SessionError(f"session ids {session_id!r} have no order; give them in the order of the batch's rows")
    ids = list(session_id) if several else [session_id]
    if not ids or None in ids:
        raise SessionError(f"session ids {session_id!r}: expected one id, a sequence of one id per prompt, or None")
    for i in ids:
        id_bytes(i)  # raises for what is none
    if len(set(ids)) < len(ids):
        raise SessionError(f"session ids {ids} are not distinct; each row needs a dialogue of its own")
    return ids  # type: ignore[return-value]


def check_audio_mask(audio_mask: object, rows: int) -> None:
    """Raise `AudioMaskError` unless a user's mask is (rows, seq_len) bool."""
    if not isinstance(audio_mask, Tensor):
        given = type(audio_mask).__name__
    elif audio_mask.dtype != torch.bool or audio_mask.dim() != 2 or len(audio_mask) != rows:
        given = f"{audio_mask.dtype} {tuple(audio_mask.shape)}"
    else:
        return
    raise AudioMaskError(f"audio_mask is {given}, expected a bool tensor ({rows}, seq_len), one row per session id")


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
        trained, here = getattr(adapter.card, name), facts[name]
        if trained is not None and here is not None and trained != here:
            raise HostMismatchError(
                f"the adapter was trained on a host with {name} {trained!r}, this one has {here!r}; load that host, or "
                "train an adapter for this one"
            )
    trained, here = adapter.card.base_model_name_or_path, facts["base_model_name_or_path"]
    if trained and here and trained.rpartition("/")[2] != here.rpartition("/")[2]:
        warnings.warn(
            f"the adapter was trained on {trained}, this host is {here}; it works, but expect worse results",
            BaseModelWarning,
            stacklevel=3,
        )


def check_store(store: SessionStore | str | os.PathLike[str] | None) -> SessionStore:
    """The store that is meant; raises `ConfigError` for what is none."""
    if store is None:
        return InMemoryStore()
    if isinstance(store, str | os.PathLike):
        return open_store(store)
    if isinstance(store, type):
        raise ConfigError(f"store is the class {store.__name__} itself; give an instance, {store.__name__}(…)")
    name = f"{type(store).__module__.partition('.')[0]}.{type(store).__name__}"
    needed = ("get", "put", "drop", "__iter__")
    if missing := [method for method in needed if not callable(getattr(store, method, None))]:
        raise ConfigError(
            f"store is a {name} without {', '.join(missing)}; give a SessionStore, a folder or a URL of Redis, and a "
            "client of Redis as RedisStore(client)"
        )
    if waits := [method for method in needed if inspect.iscoroutinefunction(getattr(store, method))]:
        raise ConfigError(f"store is a {name} whose {', '.join(waits)} must be awaited; a store answers at once")
    return store


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
            "out, or set the layer_idx of adapter.card to None first"
        )
    if layer_idx >= own:
        raise ConfigError(
            f"layer_idx={layer_idx} is one of the last {shared} layers, which reuse the keys and values of earlier "
            f"ones, so that no token would hear a memory there; choose 0 … {own - 1}"
        )
    return layer_idx
