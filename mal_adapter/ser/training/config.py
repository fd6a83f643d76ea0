"""`TrainingConfig`: the settings of a training run, validated, as they are saved in checkpoints and reports."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from mal_adapter.errors import ConfigError
from mal_adapter.memory.config import check_integer
from mal_adapter.ser.names import composed

__all__ = ["TrainingConfig"]

_CHOICES = {
    "schedule": ("cosine", "constant"),
    "mixed_precision": ("no", "bf16"),
    "select_by": ("weighted_f1", "loss"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The settings of a training run: steps, optimizer, loss and selection; immutable and validated.

    Args:
        epochs: Passes over all training dialogues, at most.
        batch_size: Dialogues per optimizer step, over all processes; gradients of smaller forwards are accumulated.
        side_by_side: Dialogues per forward and process, at most. More of them need more device memory; the gradient is
            the same.
        window: Utterances through which gradients flow back; the memory keeps older content, without gradients. None
            is the whole dialogue. At least 2, since the loss of later utterances trains what an utterance writes.
        learning_rate: Of AdamW, after warm-up.
        weight_decay: Of AdamW.
        schedule: The learning rate after warm-up: "cosine" falls to zero at the end of the last epoch, "constant"
            stays.
        warmup: The fraction of all steps in which the learning rate rises from zero, 0 … 1.
        max_grad_norm: Gradients with a larger norm are scaled down to this norm.
        class_weights: The weight of each label in the loss. None is 1 for all; "balanced" gives all labels the same
            total weight; a mapping of label to weight leaves missing labels at 1.
        select_by: The metric on the dev dialogues that chooses the best epoch: "weighted_f1" or "loss".
        patience: Stop after this many epochs without improvement; None disables early stopping.
        lora_rank: Rank of a LoRA (PEFT) on all linear layers of the host's decoder, trained beside the memory; None
            leaves the host unchanged.
        gradient_checkpointing: Recompute the decoder layers in backward: less memory, more time. Needs labels of one
            token each.
        cache_activations: Run the frozen part of the host, up to the memory, once per utterance of the training and of
            the dev dialogues, and save its output on disk, in `activations` of the output folder. Needs labels of one
            token each and no LoRA.
        mixed_precision: "bf16" runs under bfloat16 autocast; the memory's state stays float32.
        checkpoint_every: Steps between two checkpoints; there is one at the end of each epoch, too.
        seed: Of the order of dialogues, of dropout and of a LoRA's initial weights.

    Raises:
        ConfigError: A field is out of range.

    Example:
        >>> TrainingConfig(epochs=3, class_weights="balanced").learning_rate
        0.001
        >>> TrainingConfig(window=1)
        Traceback (most recent call last):
        ...
        mal_adapter.errors.ConfigError: window=1 is not an integer of at least 2, or None
    """

    epochs: int = 10
    batch_size: int = 8
    side_by_side: int = 8
    window: int | None = 8
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    class_weights: Literal["balanced"] | Mapping[str, float] | None = None
    select_by: Literal["weighted_f1", "loss"] = "weighted_f1"
    patience: int | None = 3
    lora_rank: int | None = None
    gradient_checkpointing: bool = False
    cache_activations: bool = False
    mixed_precision: Literal["no", "bf16"] = "no"
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 1),
            ("batch_size", 1),
            ("side_by_side", 1),
            ("checkpoint_every", 1),
            ("seed", 0),
        ):
            check_integer(name, getattr(self, name), least)
        for name, least in (("window", 2), ("patience", 1), ("lora_rank", 1)):
            check_integer(name, getattr(self, name), least, optional=True)
        for name, most in (("learning_rate", 10.0), ("weight_decay", 10.0), ("max_grad_norm", 1e6), ("warmup", 1.0)):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= most or (value == 0 and name in _POSITIVE):
                raise ConfigError(
                    f"{name}={value!r} is not a number {'above' if name in _POSITIVE else 'from'} 0 to {most:g}"
                )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")
        for name in ("gradient_checkpointing", "cache_activations"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not True or False")
        if self.cache_activations and (self.lora_rank is not None or self.gradient_checkpointing):
            raise ConfigError(
                "cache_activations can not be combined with lora_rank or gradient_checkpointing; leave one of them off"
            )
        weights = self.class_weights
        if isinstance(weights, Mapping):
            if not all(isinstance(k, str) and _is_number(w) and 0 <= w <= 1e6 for k, w in weights.items()):
                raise ConfigError(f"class_weights={dict(weights)!r} are not labels with weights from 0 to 1e6")
            if len(spelled := {composed(name): weight for name, weight in weights.items()}) < len(weights):
                raise ConfigError(f"class_weights={dict(weights)!a} has a label twice, in two Unicode forms")
            object.__setattr__(self, "class_weights", spelled)
        elif weights not in (None, "balanced"):
            raise ConfigError(f"class_weights={weights!r} is neither None, 'balanced' nor label -> weight")

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, in the order of the class."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "TrainingConfig":
        """Inverse of `to_dict`; missing fields have their defaults.

        Raises:
            ConfigError: A field is unknown or out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(fields) - set(known)):
            raise ConfigError(f"unknown training config fields {unknown}; this version knows {', '.join(known)}")
        return cls(**fields)


_POSITIVE = ("learning_rate", "max_grad_norm")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
