"""How a memory in vLLM is configured: the options, and the arguments of an engine that is safe for it."""

import dataclasses
import json
import os
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from mal_adapter.errors import ConfigError
from mal_adapter.stores import InMemoryStore, SessionStore, open_store
from mal_adapter.stores.base import check_count, check_ttl

__all__ = [
    "ADMISSION",
    "SECTION",
    "STORE_VARIABLE",
    "WORKER",
    "MemoryOptions",
    "admission_is_installed",
    "engine_args",
    "serve_flags",
]

SECTION = "mal_adapter"
STORE_VARIABLE = "MAL_ADAPTER_STORE"
"""The environment variable with the store of an engine whose configuration names none."""

WORKER = "mal_adapter.vllm.MemoryWorker"
ADMISSION = "mal_adapter.vllm.admission:SessionAdmission"


@dataclasses.dataclass(frozen=True)
class MemoryOptions:
    """The section `mal_adapter` of vLLM's `--additional-config`.

    Attributes:
        adapter: A folder or Hub id.
        store: A folder or a Redis URL; None keeps sessions in the engine's process.
        ttl_s: A session expires this many seconds after its last use; None means never.
        max_sessions: The largest number of sessions in the engine's process, of which the least recently used are
            evicted; only without a store.

    Raises:
        ConfigError: A value has the wrong type or is out of range.

    Example:
        >>> MemoryOptions.read({"mal_adapter": {"adapter": "user/mal-qwen2-audio"}}).make_store()
        InMemoryStore(0 sessions, 0 bytes, 0 evicted)
        >>> MemoryOptions.read({"mal_adapter": {"adapter": "user/mal-qwen2-audio", "adaptor": "typo"}})
        Traceback (most recent call last):
        ...
        mal_adapter.errors.ConfigError: --additional-config has mal_adapter.adaptor; known are adapter, store, ...
    """

    adapter: str
    store: str | None = None
    ttl_s: float | None = None
    max_sessions: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("adapter", self.adapter), ("store", self.store)):
            if (name == "adapter" or value is not None) and (not isinstance(value, str) or not value):
                raise ConfigError(f"{name}={value!r} is not a folder, Hub id or URL; the engine's processes open it")
        check_ttl(self.ttl_s)
        check_count("max_sessions", self.max_sessions)
        if self.store is not None and self.max_sessions is not None:
            raise ConfigError(f"max_sessions={self.max_sessions} limits this process, not the store; give ttl_s")

    @classmethod
    def read(cls, additional_config: object) -> "MemoryOptions":
        """The options in vLLM's additional configuration.

        Raises:
            ConfigError: There are none, or one of them is not known or not valid.
        """
        section = additional_config.get(SECTION) if isinstance(additional_config, Mapping) else None
        if not isinstance(section, Mapping) or "adapter" not in section:
            raise ConfigError(
                """no adapter is given; add --additional-config '{"mal_adapter": {"adapter": "folder or Hub id"}}'"""
            )
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in section if name not in known]:
            raise ConfigError(
                f"--additional-config has {', '.join(f'{SECTION}.{name}' for name in unknown)}; known are "
                f"{', '.join(known)}"
            )
        # A URL may have a password, which other users of the machine see in the arguments of a process.
        hidden = os.environ.get(STORE_VARIABLE)
        return cls(**({"store": hidden, **section} if hidden else section))

    def make_store(self) -> SessionStore:
        """Open the store.

        Raises:
            ConfigError: The place is not valid.
            StoreError: The folder can't be created.
        """
        if self.store is None:
            return InMemoryStore(self.max_sessions or 1024, self.ttl_s)
        return open_store(self.store, self.ttl_s)


def engine_args(
    adapter: str | os.PathLike[str],
    *,
    store: str | os.PathLike[str] | None = None,
    ttl_s: float | None = None,
    max_sessions: int | None = None,
) -> dict[str, Any]:
    """The arguments of `vllm.LLM` or `AsyncEngineArgs` with which an engine has the memory and is safe.

    Args:
        adapter: A folder or Hub id.
        store: A folder or a Redis URL, for sessions that outlive the engine or that several engines share; None keeps
            them in the engine's process.
        ttl_s: A session expires this many seconds after its last use; None means never.
        max_sessions: As in `MemoryOptions`.

    Raises:
        ConfigError: One of them is not valid.

    Example:
        >>> arguments = engine_args("user/mal-qwen2-audio", store="redis://host/0")
        >>> arguments["enable_prefix_caching"], arguments["enable_chunked_prefill"]
        (False, False)
    """
    place = None if store is None else os.fspath(store)
    options = MemoryOptions(os.fspath(adapter), place, ttl_s, max_sessions)
    section = {name: value for name, value in dataclasses.asdict(options).items() if value is not None}
    arguments: dict[str, Any] = {
        "worker_cls": WORKER,
        "additional_config": {SECTION: section},
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
        "async_scheduling": False,  # allowed where prompts have one clip
        "mm_processor_cache_gb": 0,
    }
    if not admission_is_installed():  # a clone on PYTHONPATH has no entry points
        arguments["logits_processors"] = [ADMISSION]
    return arguments


def serve_flags(arguments: Mapping[str, Any]) -> list[str]:
    """The flags of `vllm serve` that say the same as arguments of `vllm.LLM`.

    Example:
        >>> serve_flags({"enable_prefix_caching": False, "mm_processor_cache_gb": 0})
        ['--no-enable-prefix-caching', '--mm-processor-cache-gb', '0']
    """
    flags: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            flags += [f"--{flag}", *map(str, value)]
        else:
            flags += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def admission_is_installed() -> bool:
    """Whether vLLM finds the admission check by itself, as the entry point of the installed package."""
    return any(point.value == ADMISSION for point in entry_points(group="vllm.logits_processors"))
