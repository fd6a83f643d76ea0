"""The memory's state within a block: sessions, forwards and the hooks that run them."""

from typing import TYPE_CHECKING

from mal_adapter.lazy import lazy_names

if TYPE_CHECKING:
    from mal_adapter.hooks.session import Session
    from mal_adapter.hooks.wiring import MemoryHooks, drop_copied_hooks, has_memory

__all__ = ["MemoryHooks", "Session", "drop_copied_hooks", "has_memory"]

if not TYPE_CHECKING:  # a checker that saw this function would take every misspelt name for an Any
    __getattr__ = lazy_names(
        __name__,
        {
            "MemoryHooks": "hooks.wiring",
            "Session": "hooks.session",
            "drop_copied_hooks": "hooks.wiring",
            "has_memory": "hooks.wiring",
        },
    )
