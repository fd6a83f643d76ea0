"""`Spans`: where each row's tokens are in one flat list of tokens, so that a ragged batch needs no padding."""

import itertools
from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mal_adapter.memory.transfer import to_device

__all__ = ["Spans"]


class Spans:
    """The tokens of some rows, one row after the other in a flat list. Nothing here waits for the device.

    Its tensors are made when they are first used, once, outside of inference mode, so that autograd may save them.

    Args:
        lengths: Tokens per row, on the host; a row may have none.
        device: Where the tokens are.

    Attributes:
        longest: The largest length.
        equal: Whether all rows are equally long.

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
        self._shares: dict[torch.dtype, Float[Tensor, "rows longest"]] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        """The number of tokens of all rows."""
        return sum(self.lengths)

    @cached_property
    def _numbers(self) -> Int[Tensor, " numbers"]:
        """Offsets and counts, in one copy from the host."""
        with torch.inference_mode(False):
            numbers = [0, *itertools.accumulate(self.lengths), *self.lengths]
            return to_device(torch.tensor(numbers, dtype=torch.int32), self.device)

    @cached_property
    def offsets(self) -> Int[Tensor, " bounds"]:
        """Where each row begins, and where the last one ends: rows + 1 numbers, int32, on the device."""
        if not (self.equal and self.longest):
            return self._numbers[: len(self) + 1]
        step = self.longest
        with torch.inference_mode(False):  # computed there, which a CUDA graph can hold; a copy from the host it can't
            return torch.arange(0, step * len(self) + 1, step, dtype=torch.int32, device=self.device)

    @cached_property
    def counts(self) -> Int[Tensor, " rows"]:
        """The lengths; int32, on the device."""
        if not self.equal:
            return self._numbers[len(self) + 1 :]
        with torch.inference_mode(False):
            return torch.full((len(self),), self.longest, dtype=torch.int32, device=self.device)

    @cached_property
    def row_of_token(self) -> Int[Tensor, " tokens"]:
        """The row of each token; int64, on the device."""
        with torch.inference_mode(False):
            rows = torch.arange(len(self), device=self.device)
            return rows.repeat_interleave(self.counts, output_size=self.total)

    @cached_property
    def _padded_from(self) -> Int[Tensor, " tokens"]:
        """For each token its place in a padded (rows · longest) list."""
        with torch.inference_mode(False):
            before = torch.arange(len(self), device=self.device) * self.longest - self.offsets[:-1]
            return torch.arange(self.total, device=self.device) + before[self.row_of_token]

    @cached_property
    def inside(self) -> Bool[Tensor, "rows longest"]:
        """False at padding."""
        with torch.inference_mode(False):
            if self.equal:
                return torch.ones(len(self), self.longest, dtype=torch.bool, device=self.device)
            return torch.arange(self.longest, device=self.device) < self.counts[:, None]

    def shares(self, dtype: torch.dtype) -> Float[Tensor, "rows longest"]:
        """1 / length at each token of a row, zero at padding: the weights of the row's mean."""
        if dtype not in self._shares:
            with torch.inference_mode(False):
                if self.equal:
                    shape, share = (len(self), self.longest), 1 / max(self.longest, 1)
                    self._shares[dtype] = torch.full(shape, share, dtype=dtype, device=self.device)
                else:
                    self._shares[dtype] = self.inside.to(dtype) / self.counts.clamp_min(1)[:, None]
        return self._shares[dtype]

    def prepare(self, dtype: torch.dtype = torch.float32) -> "Spans":
        """Make all tensors now and return the spans: a CUDA graph can't contain the copy from the host.

        Args:
            dtype: That of the adapter's parameters.
        """
        _ = self.offsets, self.counts, self.inside, self.shares(dtype)
        if not self.equal:
            _ = self._padded_from
        return self

    def pad(self, tokens: Shaped[Tensor, "tokens ..."]) -> Shaped[Tensor, "rows longest ..."]:
        """One row after the other, filled up with zeros; a view where all rows are equally long."""
        shape = (len(self), self.longest, *tokens.shape[1:])
        if self.equal:
            return torch.unflatten(tokens, 0, shape[:2])
        padded = tokens.new_zeros((len(self) * self.longest, *tokens.shape[1:]))
        return padded.index_copy_(0, self._padded_from, tokens).view(shape)

    def flatten(self, padded: Shaped[Tensor, "rows longest ..."]) -> Shaped[Tensor, "tokens ..."]:
        """The inverse of `pad`."""
        flat = padded.flatten(0, 1)
        return flat if self.equal else flat.index_select(0, self._padded_from)

    def spread(self, rows: Shaped[Tensor, "rows ..."]) -> Shaped[Tensor, "tokens ..."]:
        """The entry of each token's row."""
        if self.equal:
            return rows[:, None].expand(-1, self.longest, *rows.shape[1:]).flatten(0, 1)
        return rows.index_select(0, self.row_of_token)

    def add_rows(
        self, tokens: Float[Tensor, "tokens dim"], rows: Float[Tensor, "rows dim"]
    ) -> Float[Tensor, "tokens dim"]:
        """Each token plus the entry of its row."""
        if self.equal:
            return (self.pad(tokens) + rows[:, None]).flatten(0, 1)
        return tokens + self.spread(rows)

    def add_rows_(
        self, tokens: Float[Tensor, "tokens dim"], rows: Float[Tensor, "rows dim"]
    ) -> Float[Tensor, "tokens dim"]:
        """As `add_rows`, in place of `tokens`."""
        if self.equal:
            self.pad(tokens).add_(rows[:, None])
            return tokens
        return tokens.add_(self.spread(rows))

    def all_by_row(self, tokens: Bool[Tensor, " tokens"]) -> Bool[Tensor, " rows"]:
        """Whether all tokens of a row are True."""
        padded = self.pad(tokens)
        return padded.all(-1) if self.equal else (padded | ~self.inside).all(-1)
