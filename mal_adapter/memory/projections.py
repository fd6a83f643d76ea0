"""The layers around a memory: from tokens to queries, keys, values and gates, and from its answers to a residual."""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mal_adapter.memory.spans import Spans

__all__ = ["FullProjections", "Layers", "Projections", "Seen"]

Tokens = Float[Tensor, "tokens hidden_size"]
Narrow = Float[Tensor, "tokens memory_dim"]
Seen = Float[Tensor, "tokens _memory_dim_or_none"]
"""The read-out's view of the tokens. It has no columns if the read-out does not see them."""
Valid = Bool[Tensor, " tokens"]


class Layers(NamedTuple):
    """The layers of an adapter, by the names of its attributes."""

    norm: nn.LayerNorm
    in_proj: nn.Linear
    pool_proj: nn.Linear | None
    readout_norm: nn.LayerNorm
    readout_in: nn.Linear
    dropout: nn.Dropout
    readout_out: nn.Linear


class Projections(Protocol):
    """What is computed with the layers of an adapter."""

    def project(
        self, tokens: Tokens, spans: Spans, valid: Valid | None, causal: bool, rows: slice
    ) -> Float[Tensor, "tokens rows"]:
        """The projections of each token and of the mean of its row.

        Args:
            tokens: Any float dtype.
            spans: Where each row is.
            valid: Tokens with False have no effect, whatever their numbers are. All are valid if None.
            causal: Take the mean of the tokens up to each one.
            rows: Those of `in_proj` and `pool_proj`.
        """

    def read_out(self, answer: Narrow, token: Seen, valid: Valid | None) -> Tokens:
        """The residual of each token.

        Args:
            answer: The memory's.
            token: The read-out's view of it.
            valid: The residual of a token with False is zero.
        """


class FullProjections:
    """In the dtype of the parameters, with derivatives.

    Args:
        layers: The adapter's.
    """

    def __init__(self, layers: Layers) -> None:
        self._layers = layers

    def project(
        self, tokens: Tokens, spans: Spans, valid: Valid | None, causal: bool, rows: slice
    ) -> Float[Tensor, "tokens rows"]:
        """See `Projections`."""
        norm, in_proj, pool_proj = self._layers[:3]
        if valid is not None:
            # Values at other positions, even NaN, must affect neither the result nor a gradient.
            tokens = torch.where(valid[:, None], tokens, 0)
        x = norm(tokens.to(norm.weight.dtype))
        projected = F.linear(x, in_proj.weight[rows], in_proj.bias[rows])
        if pool_proj is None:
            return projected
        pool, padded = pool_proj.weight[rows], spans.pad(x)
        mask = spans.inside if valid is None else spans.pad(valid)
        if causal:
            sums = torch.where(mask[..., None], padded, 0).cumsum(-2)
            means = spans.flatten(sums / mask[..., None].cumsum(-2).clamp_min(1))
            return projected + F.linear(means.to(x.dtype), pool)
        share = spans.shares(x.dtype) if valid is None else _shares(mask, x.dtype)
        mean = (share[:, None] @ padded).squeeze(1)
        return spans.add_rows(projected, F.linear(mean.to(x.dtype), pool))

    def read_out(self, answer: Narrow, token: Seen, valid: Valid | None) -> Tokens:
        """See `Projections`."""
        evidence = self._layers.readout_norm(torch.cat((answer.to(token.dtype), token), dim=-1))
        value, gate = self._layers.readout_in(evidence).chunk(2, dim=-1)
        inner = value * F.silu(gate)
        if valid is not None:  # zero where the narrow side is: readout_out has no bias
            inner = torch.where(valid[:, None], inner, 0)
        residual: Tensor = self._layers.readout_out(self._layers.dropout(inner))
        return residual


def _shares(mask: Bool[Tensor, "rows longest"], dtype: torch.dtype) -> Float[Tensor, "rows longest"]:
    """The weights of each row's mean."""
    return mask.to(dtype) / mask.sum(-1, keepdim=True).clamp_min(1)
