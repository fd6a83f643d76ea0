"""The Titans update token by token, directly from the recurrence. It is slow; it is the reference in the tests.

Gradients come from autograd and every product of gates from a loop, so nothing of the closed form of
`mal_adapter.memory.titans` is used here.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mal_adapter.memory.chunk import MAX_SILU_SLOPE
from mal_adapter.memory.gates import MAX_LOGIT, Gates
from mal_adapter.memory.rule import ByHead, InitialWeights, Weights
from mal_adapter.memory.titans import read

__all__ = ["write_by_token"]

Matrix = Float[Tensor, "_d_in _d_out"]
"""The weights of one layer, row and head."""

Scalar = Float[Tensor, ""]
"""A number of one token."""


def write_by_token(
    initial: InitialWeights,
    weights: Weights,
    momentum: Weights,
    keys: ByHead,
    values: ByHead,
    gates: Gates,
    mask: Bool[Tensor, "batch seq_len"],
    chunk_size: int,
) -> tuple[Weights, Weights]:
    """Write one row, head and token at a time; arguments and result as of `mal_adapter.memory.titans.write`.

    Example:
        >>> gates = Gates(*torch.zeros(3, 1, 1, 2))
        >>> zero = (torch.zeros(1, 1, 2, 2),)
        >>> keys, values = torch.eye(2).view(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> (w,), _ = write_by_token((torch.zeros(1, 2, 2),), zero, zero, keys, values, gates, mask, 1)
        >>> w.detach()
        tensor([[[[0.5000, 0.5000],
                  [0.5000, 0.5000]]]])
    """
    batch, heads, _, _ = keys.shape
    results = [
        [
            _one_head(
                [w0[h] for w0 in initial],
                [w[b, h] for w in weights],
                [s[b, h] for s in momentum],
                keys[b, h],
                values[b, h],
                Gates(*(g[b, h].clamp(-MAX_LOGIT, MAX_LOGIT) for g in gates)),
                mask[b],
                chunk_size,
            )
            for h in range(heads)
        ]
        for b in range(batch)
    ]

    def gather(kind: int) -> Weights:
        layers = range(len(initial))
        return tuple(torch.stack([torch.stack([head[kind][i] for head in row]) for row in results]) for i in layers)

    return gather(0), gather(1)


def _one_head(
    initial: list[Matrix],
    weights: list[Matrix],
    momentum: list[Matrix],
    keys: Float[Tensor, "seq_len head_dim"],
    values: Float[Tensor, "seq_len head_dim"],
    gates: Gates,
    mask: Bool[Tensor, " seq_len"],
    chunk_size: int,
) -> tuple[list[Matrix], list[Matrix]]:
    for start in range(0, len(keys), chunk_size):
        tokens = [t for t in range(start, min(start + chunk_size, len(keys))) if mask[t]]
        if not tokens:
            continue
        current = [w0 + w for w0, w in zip(initial, weights, strict=True)]
        surprise = [_gradient(current, keys[t], values[t]) for t in tokens]
        curvature = [_curvature(current, keys[t]) for t in tokens]
        theta, eta = ([torch.sigmoid(g[t]) for t in tokens] for g in (gates.step, gates.momentum))
        # 1 − gate is the sigmoid of minus the logit; a subtraction would lose digits if the gate is near 1
        friction, keep = ([torch.sigmoid(-g[t]) for t in tokens] for g in (gates.momentum, gates.forget))
        trust = _trust(theta, eta, friction, keep, curvature)
        for t, gradient in enumerate(surprise):
            momentum = [eta[t] * s - trust * theta[t] * g for s, g in zip(momentum, gradient, strict=True)]
            weights = [keep[t] * w + s for w, s in zip(weights, momentum, strict=True)]
    return weights, momentum


def _gradient(
    current: list[Matrix], key: Float[Tensor, " head_dim"], value: Float[Tensor, " head_dim"]
) -> tuple[Matrix, ...]:
    with torch.enable_grad():
        current = [w if w.requires_grad else w.detach().requires_grad_() for w in current]
        answer = read([w[None, None] for w in current], key.view(1, 1, 1, -1)).view(-1)
        loss = 0.5 * (answer - value).square().sum()
        return torch.autograd.grad(loss, current, create_graph=True)


def _curvature(current: list[Matrix], key: Float[Tensor, " head_dim"]) -> Scalar:
    if len(current) == 1:
        return key @ key
    activation = torch.nn.functional.silu(key @ current[0])
    return activation @ activation + (current[1] ** 2).sum() * (key @ key) * MAX_SILU_SLOPE**2


def _trust(
    theta: list[Scalar], eta: list[Scalar], friction: list[Scalar], keep: list[Scalar], curvature: list[Scalar]
) -> Scalar:
    """1 / max(1, Σ θ c J, Σ θ d J / (1 − Π η)), d_t being what momentum from token t adds to chunks after this one."""
    n = len(theta)
    one = torch.ones_like(theta[0])

    def product(factors: list[Tensor]) -> Tensor:
        return torch.stack([one, *factors]).prod()

    a = [product(keep[t + 1 :]) for t in range(n)]
    own, later = one * 0, one * 0
    for t in range(n):
        c = sum((a[j] * product(eta[t + 1 : j + 1]) for j in range(t, n)), one * 0)
        d = sum((a[j] * product(eta[: j + 1]) for j in range(t)), one * 0) * product(eta[t + 1 :])
        own = own + theta[t] * c * curvature[t]
        later = later + theta[t] * d * curvature[t]
    loss = sum((friction[t] * product(eta[:t]) for t in range(n)), one * 0)  # 1 − Π η
    return 1 / torch.stack((one, own, later / loss.clamp_min(torch.finfo(loss.dtype).tiny))).max()
