"""Train a memory on dialogues."""

from typing import TYPE_CHECKING

from mal_adapter.lazy import lazy_names

if TYPE_CHECKING:
    from mal_adapter.ser.training.config import TrainingConfig
    from mal_adapter.ser.training.members import train_members
    from mal_adapter.ser.training.train import train_memory

__all__ = ["TrainingConfig", "train_members", "train_memory"]

if not TYPE_CHECKING:  # a checker that saw this function would take every misspelt name for an Any
    __getattr__ = lazy_names(
        __name__,
        {
            "TrainingConfig": "ser.training.config",
            "train_members": "ser.training.members",
            "train_memory": "ser.training.train",
        },
        extra="train",
    )
