"""`Spans`: where each row's tokens are in one flat list of tokens, so that a ragged batch needs no padding."""

import itertools
from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

__all__ = ["Spans"]


class Spans:
    """The tokens of some rows, one row after the other in a flat list. Nothing here waits for the device.

    Args:
        lengths: Tokens per row, on the host; a row may have none.
        device: Where the tokens are.

    Example:
        >>> spans = Spans([2, 1], torch.device("cpu"))
        >>> spans.pad(torch.tensor([5, 6, 7]))
        tensor([[5, 6],
                [7, 0]])
        >>> spans.flatten(spans.pad(torch.tensor([5, 6, 7])))
        tensor([5, 6, 7])
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = tuple(lengths)
        self.device = device
        self.longest = max(self.lengths, default=0)
        self.equal = all(length == self.longest for length in self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def offsets(self) -> Int[Tensor, " bounds"]:
        """Where each row begins, and where the last one ends; int32, on the device."""
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32).to(
            self.device, non_blocking=True
        )

    @cached_property
    def row_of_token(self) -> Int[Tensor, " tokens"]:
        """The row of each token; int64, on the device."""
        return self._put([row for row, length in enumerate(self.lengths) for _ in range(length)])

    @cached_property
    def _padded_from(self) -> Int[Tensor, " tokens"]:
        """For each token its place in a padded (rows · longest) list."""
        return self._put([row * self.longest + t for row, length in enumerate(self.lengths) for t in range(length)])

    @cached_property
    def inside(self) -> Bool[Tensor, "rows longest"]:
        """False at padding."""
        if self.equal:
            return torch.ones(len(self), self.longest, dtype=torch.bool, device=self.device)
        positions = torch.arange(self.longest, device=self.device)
        return positions < self.offsets.diff()[:, None]

    def pad(self, tokens: Shaped[Tensor, "tokens ..."]) -> Shaped[Tensor, "rows longest ..."]:
        """One row after the other, filled up with zeros; a view where all rows are equally long."""
        shape = (len(self), self.longest, *tokens.shape[1:])
        if self.equal:
            return tokens.view(shape)
        padded = tokens.new_zeros((len(self) * self.longest, *tokens.shape[1:]))
        return padded.index_copy(0, self._padded_from, tokens).view(shape)

    def flatten(self, padded: Shaped[Tensor, "rows longest ..."]) -> Shaped[Tensor, "tokens ..."]:
        """The inverse of `pad`."""
        flat = padded.flatten(0, 1)
        return flat if self.equal else flat.index_select(0, self._padded_from)

    def _put(self, numbers: list[int]) -> Int[Tensor, " tokens"]:
        return torch.tensor(numbers, dtype=torch.int64).to(self.device, non_blocking=True)
