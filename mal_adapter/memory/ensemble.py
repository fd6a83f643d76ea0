"""`MemoryEnsemble`: several memories of one host, whose answers are averaged."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from mal_adapter.errors import ConfigError, StateMismatchError
from mal_adapter.memory.adapter import MemoryAdapter
from mal_adapter.memory.config import MemoryConfig
from mal_adapter.memory.hub_mixin import MEMBERS, MOST_MEMBERS, Pretrained, member_count
from mal_adapter.memory.state import MemoryState
from mal_adapter.serialization.adapter_folder import AdapterConfig
from mal_adapter.serialization.hub import HubOptions, read_adapter

if TYPE_CHECKING:
    from typing_extensions import Self  # typing's is new in Python 3.11

__all__ = ["AnyAdapter", "MemoryEnsemble", "load_adapter"]


class MemoryEnsemble(Pretrained):
    """Several adapters of one host, trained from different seeds, as one adapter: it is saved, pushed, attached and
    served as one is, and a session has one state, with those of all members.

    Each member needs a forward of its own through the layers above the memory, so that only an `EmotionRecognizer`
    answers with it: by the mean of the members' probabilities.

    Args:
        members: Adapters with equal configurations, from 2 to 64, trained at one layer for one task.

    Attributes:
        members: The adapters.
        metadata: That of the first member, until it is set.

    Raises:
        ConfigError: Their number, configurations, layers, hosts or tasks don't allow it.

    Example:
        >>> config = MemoryConfig(hidden_size=32, memory_dim=16, num_heads=2)
        >>> both = MemoryEnsemble([MemoryAdapter(config), MemoryAdapter(config)]).eval()
        >>> state = both.initial_state()
        >>> len(state.weights), [len(part.weights) for part in both.split(state)]
        (4, [2, 2])
    """

    members: Sequence[MemoryAdapter]

    def __init__(self, members: Sequence[MemoryAdapter]) -> None:
        members = tuple(members)
        if not 2 <= len(members) <= MOST_MEMBERS or not all(isinstance(m, MemoryAdapter) for m in members):
            kinds = ", ".join(type(member).__name__ for member in members[:3]) or "nothing"
            raise ConfigError(f"expected 2 to {MOST_MEMBERS} MemoryAdapter, got {len(members)}: {kinds}")
        first = members[0]
        for index, member in enumerate(members[1:], start=1):
            for name, theirs, ours in (
                ("configuration", member.config, first.config),
                ("layer_idx", member.metadata.layer_idx, first.metadata.layer_idx),
                ("host", member.metadata.base_model_name_or_path, first.metadata.base_model_name_or_path),
                ("task", member.metadata.task, first.metadata.task),
            ):
                if theirs != ours:
                    raise ConfigError(
                        f"the {name} of member {index} is {theirs!r}, and member 0's {ours!r}; only adapters that "
                        "differ in their weights alone can be averaged"
                    )
        super().__init__(first.config)
        self.members = cast("Sequence[MemoryAdapter]", nn.ModuleList(members))
        self.metadata = first.metadata
        self.train(any(member.training for member in members))  # a new module would be in training mode

    @property
    def section(self) -> dict[str, Any]:
        """The "memory" section of its `config.json`."""
        return {**self.config.to_dict(), MEMBERS: len(self.members)}

    @property
    def initial(self) -> nn.ParameterList:
        """The first member's initial weights; all members have their shapes and are on their device."""
        return self.members[0].initial

    @property
    def state_dtype(self) -> torch.dtype:
        """As of each member."""
        return self.members[0].state_dtype

    def initial_state(self, batch_size: int = 1) -> MemoryState:
        """The empty state of `batch_size` new dialogues, on the members' device."""
        parts = [member.initial_state(batch_size) for member in self.members]
        return _joined(parts, None if self.training else self.fingerprint())

    def split(self, state: MemoryState) -> list[MemoryState]:
        """A state per member, of the same dialogues."""
        depth = len(self.initial)
        return [
            dataclasses.replace(
                state,
                weights=state.weights[index * depth : (index + 1) * depth],
                momentum=state.momentum[index * depth : (index + 1) * depth],
                answers=_part(state.answers, index, len(self.members)),
                fingerprint=None if state.fingerprint is None else member.fingerprint(),
            )
            for index, member in enumerate(self.members)
        ]

    def join(self, before: MemoryState, after: Sequence[MemoryState]) -> MemoryState:
        """The state after an utterance. If a member could not write it, none has: all members know the same past.

        Args:
            before: The state that all members started from.
            after: Each member's state after the utterance.
        """
        before = before.to(after[0].device)  # a host that was moved has taken its members along
        joined = _joined(after, before.fingerprint)
        old = _joined(self.split(before), before.fingerprint)
        skipped = torch.stack([part.skipped_writes > before.skipped_writes for part in after]).any(0)

        def select(new: Tensor, kept: Tensor) -> Tensor:
            return torch.where(skipped.view(-1, *[1] * (new.dim() - 1)), kept, new)

        return MemoryState(
            tuple(map(select, joined.weights, old.weights)),
            tuple(map(select, joined.momentum, old.momentum)),
            utterances=select(joined.utterances, before.utterances),
            tokens=select(joined.tokens, before.tokens),
            skipped_writes=before.skipped_writes + skipped,
            fingerprint=before.fingerprint,
            answers=None if joined.answers is None or old.answers is None else select(joined.answers, old.answers),
        )

    def check_state(self, state: MemoryState) -> None:
        """Raise `StateMismatchError` unless `state` has all members' shapes and this adapter's fingerprint, if any."""
        if len(state.weights) != (expected := len(self.members) * len(self.initial)):
            raise StateMismatchError(
                f"the state has {len(state.weights)} layers, this adapter's {len(self.members)} members have "
                f"{expected}: it belongs to another adapter"
            )
        for member, part in zip(self.members, self.split(dataclasses.replace(state, fingerprint=None)), strict=True):
            member.check_state(part)
        if not self.training and state.fingerprint not in (None, self.fingerprint()):
            raise StateMismatchError(
                f"the state was written by adapter {state.fingerprint}, this one is {self.fingerprint()}; "
                "load the adapter it belongs to, or start a new session"
            )

    def fingerprint(self) -> str:
        """16 hex digits that identify the members and their order."""
        joined = " ".join(member.fingerprint() for member in self.members)
        return hashlib.sha256(joined.encode()).hexdigest()[:16]

    @classmethod
    def from_files(cls, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> "Self":
        """The adapter of files that `read_adapter` has read, in eval mode; it takes the tensors over."""
        ensemble = super().from_files(config, tensors)
        for member in ensemble.members:
            member.metadata = config.metadata
        return ensemble

    @classmethod
    def _from_section(cls, memory: Mapping[str, Any]) -> "Self":
        config = MemoryConfig.from_dict({name: value for name, value in memory.items() if name != MEMBERS})
        return cls([MemoryAdapter(config) for _ in range(member_count(memory))])

    @classmethod
    def _shapes_of_own(cls, memory: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        if member_count(memory) == 1:
            raise ConfigError("this adapter has no members; load it with MemoryAdapter.from_pretrained")
        return cls.shapes_of(memory)

    @classmethod
    def shapes_of(cls, memory: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """As `MemoryAdapter.shapes_of`."""
        return MemoryAdapter.shapes_of(memory)


AnyAdapter: TypeAlias = MemoryAdapter | MemoryEnsemble
"""What can be attached to a host."""


def load_adapter(
    folder_or_repo: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> AnyAdapter:
    """Load a trained adapter of any number of members from a folder or from the Hub.

    Args:
        folder_or_repo: As for `MemoryAdapter.from_pretrained`, like all options.

    Returns:
        A `MemoryAdapter`, or a `MemoryEnsemble` if there are several members; on the CPU and in eval mode.

    Raises:
        AdapterNotFoundError, AdapterFormatError, HubError: As `MemoryAdapter.from_pretrained`.

    Example:
        >>> from mal_adapter.demo import ADAPTER_FOLDER
        >>> len(load_adapter(ADAPTER_FOLDER).members)
        1
    """
    options = HubOptions(revision, subfolder, token, cache_dir, local_files_only, force_download)
    config, tensors = read_adapter(folder_or_repo, MemoryAdapter.shapes_of, options)
    kind = MemoryAdapter if member_count(config.memory) == 1 else MemoryEnsemble
    return kind.from_files(config, tensors)


def _joined(parts: Sequence[MemoryState], fingerprint: str | None) -> MemoryState:
    """The layers of all parts, one part after the other, with the counters of the first."""
    return dataclasses.replace(
        parts[0],
        weights=tuple(layer for part in parts for layer in part.weights),
        momentum=tuple(layer for part in parts for layer in part.momentum),
        fingerprint=fingerprint,
        answers=torch.cat(own, 1) if (own := [part.answers for part in parts if part.answers is not None]) else None,
    )


def _part(answers: Tensor | None, index: int, members: int) -> Tensor | None:
    """A member's answers; they are side by side in the dimension of the time scales."""
    return None if answers is None else answers.tensor_split(members, 1)[index]
