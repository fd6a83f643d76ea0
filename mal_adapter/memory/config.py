"""`MemoryConfig`: every size and starting point of a memory, validated."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mal_adapter.errors import ConfigError
from mal_adapter.serialization.text import shown

__all__ = ["UPDATES", "MemoryConfig", "check_integer"]

UPDATES = ("titans", "running_mean", "gru", "answers", "none")
_ONE_VECTOR = ("running_mean", "gru")

# Far above any host. No product of such sizes overflows 64 bits, so the shapes of a file can be compared safely.
_LARGEST = 2**20
_SIZES = ("memory_dim", "num_heads", "depth", "expansion", "chunk_size")
_NEW = {"utterance_tokens": None, "readout_token": True, "num_labels": None}
_OPTIONAL_SIZES = ("hidden_size", "readout_dim", "utterance_tokens", "num_labels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Shape and starting point of a `MemoryAdapter`; immutable and validated.

    Args:
        hidden_size: Width of the host's decoder layers; `attach_memory` takes it from the host unless given.
        memory_dim: Width of keys, queries and values, all heads together.
        num_heads: Independent memories that share `memory_dim`. Each has width `memory_dim // num_heads`.
        depth: Layers of each head's memory: 1 is a matrix, 2 an MLP with SiLU.
        expansion: Hidden width of a depth-2 memory, in multiples of its head's width. Ignored for depth 1.
        chunk_size: Tokens whose gradients are taken at the same weights. A smaller chunk learns better and is slower.
        readout_dim: Inner width of the gated read-out; `memory_dim` if None.
        pool_utterance: Whether keys, queries, values, gates and read-out also depend on the mean of the utterance's
            audio tokens. A voice is a property of the utterance, so this helps to recognise a speaker again.
        readout_token: Whether the read-out sees the token beside the memory's answer. Without it, the last layer of
            initial weights stays zero too, and the residual depends on the past alone: that of an empty memory is the
            same for every token. So the read-out can't learn the task itself from a small corpus.
        dropout: Dropout probability inside the read-out, while training.
        step_bias: Bias of the logit of the step size θ at the start.
        momentum_bias: Bias of the logit of the momentum η at the start.
        forget_bias: Bias of the logit of the forgetting α at the start. The sum of α over an utterance should be near
            or below 0.1, hence a strongly negative value.
        utterance_tokens: The usual number of audio tokens of an utterance. If given, the gates start so that an
            utterance of this length has the step, momentum and forgetting that the biases give one of 18 tokens (see
            `mal_adapter.memory.gate_start`). `train_memory` measures it for a fresh adapter.
        update: The update rule: "titans", or one of the baselines it has to beat, "running_mean" and "gru". The memory
            of a baseline is one vector per head (see `mal_adapter.memory.recurrent`). It ignores depth, expansion,
            chunk_size and the gates. "none" is the control: the parameters of "titans", trained and read with an empty
            memory, because nothing is ever written. "answers" is as "none", but keeps past answers (`num_labels`).
        num_labels: How many labels the host chooses from. The probabilities that it gave to each are written too, after
            each answer, as a few numbers beside the memory; see `AnswerMemory`. None keeps no answers.

    Raises:
        ConfigError: A field is out of range or does not fit another one.

    Example:
        >>> config = MemoryConfig(hidden_size=4096, memory_dim=128, num_heads=2)
        >>> config.head_dim, config.layer_shapes
        (64, ((64, 128), (128, 64)))
        >>> MemoryConfig(hidden_size=4096, memory_dim=100, num_heads=3)
        Traceback (most recent call last):
        ...
        mal_adapter.errors.ConfigError: memory_dim=100 is not a multiple of num_heads=3; change one of them
    """

    hidden_size: int | None = None
    memory_dim: int = 256
    num_heads: int = 4
    depth: int = 2
    expansion: int = 2
    chunk_size: int = 64
    readout_dim: int | None = None
    pool_utterance: bool = True
    readout_token: bool = True
    dropout: float = 0.0
    step_bias: float = -4.0
    momentum_bias: float = 0.0
    forget_bias: float = -8.0
    utterance_tokens: int | None = None
    update: str = "titans"
    num_labels: int | None = None

    def __post_init__(self) -> None:
        for field in (*_SIZES, *_OPTIONAL_SIZES):
            most = 2**31 if field == "chunk_size" else _LARGEST
            check_integer(field, getattr(self, field), 1, most=most, optional=field in _OPTIONAL_SIZES)
        for field in ("dropout", "step_bias", "momentum_bias", "forget_bias"):
            value = getattr(self, field)
            # In -1e4 … 1e4 every gate's logarithm is finite in float64. NaN and infinities are out of this range.
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e4 <= value <= 1e4:
                raise ConfigError(f"{field}={value!r} is not a finite number between -1e4 and 1e4")
        for field in ("pool_utterance", "readout_token"):
            if not isinstance(getattr(self, field), bool):
                raise ConfigError(f"{field}={getattr(self, field)!r} is not True or False")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} is not in [0, 1)")
        if self.update not in UPDATES:
            raise ConfigError(f"update={self.update!r} is not one of {', '.join(UPDATES)}")
        if self.depth > 2:
            raise ConfigError(f"depth={self.depth} is not 1 or 2; only these depths have a closed form")
        if self.memory_dim % self.num_heads:
            raise ConfigError(
                f"memory_dim={self.memory_dim} is not a multiple of num_heads={self.num_heads}; change one of them"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head's keys, queries and values."""
        return self.memory_dim // self.num_heads

    @property
    def read_rows(self) -> int:
        """How many rows of the adapter's projections belong to a read; those of a write follow."""
        return self.memory_dim * (2 if self.readout_token else 1)

    @property
    def layer_shapes(self) -> tuple[tuple[int, int], ...]:
        """(d_in, d_out) of each layer of one head's memory."""
        if self.update in _ONE_VECTOR:
            return ((1, self.head_dim),)
        if self.depth == 1:
            return ((self.head_dim, self.head_dim),)
        inner = self.expansion * self.head_dim
        return ((self.head_dim, inner), (inner, self.head_dim))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, in their order; without those that older versions don't know, if they have
        their defaults."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if name not in _NEW or value != _NEW[name]}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "MemoryConfig":
        """The configuration of these fields; the inverse of `to_dict`.

        Raises:
            ConfigError: A field is unknown, missing or out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ConfigError(f"unknown memory config fields {unknown}; this version knows {sorted(known)}")
        if fields.get("hidden_size") is None:
            raise ConfigError("the memory config has no hidden_size, the width of the host's decoder layers")
        return cls(**fields)


def check_integer(name: str, value: object, least: int, *, most: int = 2**31 - 1, optional: bool = False) -> None:
    """Raise `ConfigError` unless `value` is an integer from `least` to `most`, or None where that is allowed.

    Example:
        >>> check_integer("batch_size", "8", 1)
        Traceback (most recent call last):
        mal_adapter.errors.ConfigError: batch_size='8' is not an integer of at least 1
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(
            f"{name}={shown(value)} is not an integer of at least {least}{', or None' if optional else ''}"
        )
    if value > most:
        raise ConfigError(f"{name} is too large; the largest is {most}")
