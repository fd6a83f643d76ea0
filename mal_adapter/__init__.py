"""A neural memory per dialogue for any audio language model loaded with transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mal_adapter.attach import AttachedMemory, attach_memory
    from mal_adapter.hosts.registry import register_host
    from mal_adapter.hosts.spec import HostSpec
    from mal_adapter.memory.adapter import MemoryAdapter
    from mal_adapter.memory.config import MemoryConfig
    from mal_adapter.memory.ensemble import MemoryEnsemble
    from mal_adapter.memory.state import MemoryState

    __version__: str

__all__ = [
    "AttachedMemory",
    "HostSpec",
    "MemoryAdapter",
    "MemoryConfig",
    "MemoryEnsemble",
    "MemoryState",
    "attach_memory",
    "register_host",
]

_MODULES = {
    "AttachedMemory": "attach",
    "HostSpec": "hosts.spec",
    "MemoryAdapter": "memory.adapter",
    "MemoryConfig": "memory.config",
    "MemoryEnsemble": "memory.ensemble",
    "MemoryState": "memory.state",
    "attach_memory": "attach",
    "register_host": "hosts.registry",
}


if not TYPE_CHECKING:  # with this function, a type checker would accept every misspelt name as Any

    def __getattr__(name: str) -> Any:
        # torch takes seconds to import; `mal-adapter --help` and tools that only inspect the package don't need it.
        if name == "__version__":
            value = import_module(f"{__name__}.serialization.versions").library_version()
        elif name in _MODULES:
            value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
