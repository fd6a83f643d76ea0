"""The memory as mathematics: its update rules, its state, and the module around them."""

__all__ = [
    "adapter",
    "chunk",
    "commit",
    "config",
    "ensemble",
    "fused",
    "gates",
    "gates32",
    "half",
    "hub_mixin",
    "precision",
    "projections",
    "recurrent",
    "reference",
    "rule",
    "spans",
    "state",
    "titans",
    "transfer",
    "unwritten",
]
