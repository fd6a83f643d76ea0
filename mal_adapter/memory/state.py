"""`MemoryState`: the memories of one or more dialogues, as a value."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mal_adapter.errors import StateFormatError
from mal_adapter.serialization.atomic import write_atomically
from mal_adapter.serialization.tensors import load_tensors, save_tensors

__all__ = ["MemoryState"]

FORMAT_VERSION = "1"
_COUNTERS = ("utterances", "tokens", "skipped_writes")
_ANSWERS = "answers"
_FLOATS = (torch.float32, torch.float64)
_METADATA = {"kind", "format_version", "fingerprint"}


@dataclasses.dataclass(frozen=True, eq=False)
class MemoryState:
    """Fast weights, momentum and counters of a batch of dialogues. A value: operations return a new state.

    Attributes:
        weights: One float32 tensor per memory layer, (batch, heads, d_in, d_out): the deviation of the fast weights
            from the adapter's learned initial weights, M in the paper's recurrence.
        momentum: Same shapes: the surprise carried from token to token, S.
        utterances: (batch,) int64: utterances written.
        tokens: (batch,) int64: audio tokens written.
        skipped_writes: (batch,) int64: writes that were not finite and were skipped.
        answers: (batch, scales, labels + 1) in the dtype of the weights: decayed sums of the probabilities that the
            host gave to each label, and of ones; None if the adapter keeps no answers.
        fingerprint: Identifies the adapter that the state belongs to; None if that adapter was in training mode.

    Example:
        >>> from mal_adapter import MemoryAdapter, MemoryConfig
        >>> adapter = MemoryAdapter(MemoryConfig(hidden_size=32, memory_dim=16, num_heads=2)).eval()
        >>> state = adapter.initial_state(batch_size=3)
        >>> [tuple(w.shape) for w in state.weights]
        [(3, 2, 8, 16), (3, 2, 16, 8)]
        >>> MemoryState.from_bytes(state.to_bytes()).equals(state)
        True
    """

    weights: tuple[Float[Tensor, "batch heads _d_in _d_out"], ...]
    momentum: tuple[Float[Tensor, "batch heads _d_in _d_out"], ...]
    utterances: Int64[Tensor, " batch"]
    tokens: Int64[Tensor, " batch"]
    skipped_writes: Int64[Tensor, " batch"]
    fingerprint: str | None = None
    answers: Float[Tensor, "batch scales labels_and_count"] | None = None

    @property
    def batch_size(self) -> int:
        """The number of dialogues."""
        return self.utterances.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the fast weights."""
        return self.weights[0].device

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def clone(self) -> "MemoryState":
        """A copy that shares no storage with this state; gradients flow through it."""
        return self.map(Tensor.clone)

    def detach(self) -> "MemoryState":
        """The same values, detached from the autograd graph."""
        return self.map(Tensor.detach)

    def to(self, device: torch.device | str) -> "MemoryState":
        """The state on `device`, with the same dtypes."""
        return self.map(lambda t: t.to(device))

    def rows(self, index: Int64[Tensor, " n"]) -> "MemoryState":
        """The dialogues at `index`, (n,) int64, in that order; an index may occur more than once."""
        return self.map(lambda t: t.index_select(0, index.to(t.device)))

    def split(self) -> list["MemoryState"]:
        """One state of batch size 1 per dialogue; none shares storage with another."""
        return [self.map(lambda t, i=i: t[i : i + 1].clone()) for i in range(self.batch_size)]  # type: ignore[misc]

    @classmethod
    def stack(cls, states: "Sequence[MemoryState]") -> "MemoryState":
        """The dialogues of all `states` in one state; the inverse of `split`."""
        tensors = [state.tensors for state in states]
        merged = {name: torch.cat([t[name] for t in tensors]) for name in tensors[0]}
        return cls._from_tensors(merged, states[0].fingerprint)

    def map(self, function: Callable[[Tensor], Tensor]) -> "MemoryState":
        """A state with `function` applied to each tensor, including the counters."""
        return self._from_tensors({name: function(t) for name, t in self.tensors.items()}, self.fingerprint)

    def equals(self, other: "MemoryState") -> bool:
        """Whether both have the same bits and belong to the same adapter."""
        a, b = self.tensors, other.tensors
        return (
            self.fingerprint == other.fingerprint
            and a.keys() == b.keys()
            and all(a[k].dtype == b[k].dtype and torch.equal(a[k].cpu(), b[k].cpu()) for k in a)
        )

    def to_bytes(self) -> bytes:
        """The state as the bytes of a safetensors file."""
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors.items()}
        metadata = {"format_version": FORMAT_VERSION, "kind": "mal_adapter.MemoryState"}
        if self.fingerprint is not None:
            metadata["fingerprint"] = self.fingerprint
        return save_tensors(tensors, metadata)

    @classmethod
    def from_bytes(cls, data: bytes) -> "MemoryState":
        """The state of such bytes, on the CPU; the inverse of `to_bytes`.

        Raises:
            StateFormatError: `data` is not a memory state, is damaged, or has a format that this version can't read.
        """
        try:
            header, tensors = load_tensors(data)
        except ValueError as error:
            raise StateFormatError(f"these {len(data)} bytes are not a memory state's safetensors: {error}") from error
        metadata = header.metadata
        if metadata.get("kind") != "mal_adapter.MemoryState":
            raise StateFormatError(f"this safetensors file holds {sorted(tensors)[:4]}…, not a memory state")
        if (version := metadata.get("format_version")) != FORMAT_VERSION:
            raise StateFormatError(
                f"memory state format {version!r}, but this version reads {FORMAT_VERSION!r}; "
                "if it is newer, upgrade mal-adapter"
            )
        # An unknown key may be the damaged name of `fingerprint`, without which any adapter would accept the state.
        if unknown := sorted(metadata.keys() - _METADATA):
            raise StateFormatError(f"unknown metadata {unknown[:4]} in a memory state of format {version}")
        _check(tensors)
        return cls._from_tensors(tensors, metadata.get("fingerprint"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, atomically: an interrupted save leaves no part of a file.

        Raises:
            FileNotFoundError: The folder of `path` does not exist; it is not created.
            IsADirectoryError: `path` is a folder.
            OSError: The file can't be written.
        """
        path = Path(path)
        # Without these checks the error would name the temporary file, which the caller does not know.
        if path.is_dir():
            raise IsADirectoryError(f"can't save a state as {path}: this is a folder; give a file in it")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"can't save a state as {path}: there is no folder {path.parent}; create it first")
        write_atomically(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MemoryState":
        """Read a file written by `save`, onto the CPU.

        Raises:
            FileNotFoundError: There is no such file.
            StateFormatError: The file is not a memory state that this version can read.
        """
        try:
            return cls.from_bytes(Path(path).read_bytes())
        except StateFormatError as error:
            raise StateFormatError(f"{path}: {error}") from error

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by their names in a file."""
        layers = {f"weights.{i}": t for i, t in enumerate(self.weights)}
        layers |= {f"momentum.{i}": t for i, t in enumerate(self.momentum)}
        layers |= {name: getattr(self, name) for name in _COUNTERS}
        return layers if self.answers is None else layers | {_ANSWERS: self.answers}

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], fingerprint: str | None) -> "MemoryState":
        layers = range(_depth(tensors))
        return cls(
            weights=tuple(tensors[f"weights.{i}"] for i in layers),
            momentum=tuple(tensors[f"momentum.{i}"] for i in layers),
            **{name: tensors[name] for name in _COUNTERS},
            fingerprint=fingerprint,
            answers=tensors.get(_ANSWERS),
        )


def _depth(tensors: Mapping[str, Tensor]) -> int:
    return sum(name.startswith("weights.") for name in tensors)


def _check(tensors: Mapping[str, Tensor]) -> None:
    """Raise `StateFormatError` unless these tensors make up a state."""
    depth = _depth(tensors)
    expected = {f"{kind}.{i}" for kind in ("weights", "momentum") for i in range(depth)} | set(_COUNTERS)
    if depth == 0 or set(tensors) - {_ANSWERS} != expected:
        raise StateFormatError(f"the tensors {sorted(tensors)} are not those of a memory state")
    first = tensors["weights.0"]
    for weights, momentum in ((tensors[f"weights.{i}"], tensors[f"momentum.{i}"]) for i in range(depth)):
        if weights.dim() != 4 or weights.shape != momentum.shape or weights.shape[:2] != first.shape[:2]:
            raise StateFormatError(
                f"weights {tuple(weights.shape)} and momentum {tuple(momentum.shape)} are not both "
                "(batch, heads, d_in, d_out)"
            )
        if not weights.dtype == momentum.dtype == first.dtype or weights.dtype not in _FLOATS:
            raise StateFormatError(f"weights are {weights.dtype}, momentum {momentum.dtype}; expected one of {_FLOATS}")
    if (answers := tensors.get(_ANSWERS)) is not None and (
        answers.dim() != 3 or len(answers) != len(first) or answers.dtype != first.dtype
    ):
        raise StateFormatError(
            f"answers are {answers.dtype} {tuple(answers.shape)}, not (batch, scales, labels + 1) {first.dtype}"
        )
    for name in _COUNTERS:
        counter = tensors[name]
        if counter.dtype != torch.int64 or counter.shape != first.shape[:1] or (counter < 0).any():
            raise StateFormatError(f"{name} is {counter.dtype} {tuple(counter.shape)}, not (batch,) int64 counts")
