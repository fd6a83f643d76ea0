"""The memory as mathematics: its update rules, its state, and the module around them."""

__all__ = [
    "adapter",
    "chunk",
    "config",
    "fused",
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
