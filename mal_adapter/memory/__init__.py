"""The memory as mathematics: its update, its state and the module around it."""

__all__ = [
    "adapter",
    "chunk",
    "config",
    "gates",
    "gates32",
    "hub_mixin",
    "precision",
    "recurrent",
    "reference",
    "rule",
    "state",
    "titans",
]
