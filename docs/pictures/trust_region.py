"""The error after each chunk of nearly equal keys, such as those of a held vowel, with and without the trust region."""

from collections.abc import Callable
from typing import Any

import style
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from mal_adapter.memory.gates import Gates
from mal_adapter.memory.rule import Weights
from mal_adapter.memory.titans import read, write

WIDTH, CHUNK, CHUNKS = 32, 64, 12
NOISE = 0.3  # length of the part that varies from key to key; keys have length 1
STEPS = {"small": -6.0, "default": -4.0, "large": -2.0}  # logits of θ


def measure() -> dict[str, Any]:
    figures: dict[str, Any] = {"theta": {name: round(float(torch.tensor(b).sigmoid()), 4) for name, b in STEPS.items()}}
    for name, step_bias in STEPS.items():
        figures[name] = {"with": _errors(step_bias, write), "without": _errors(step_bias, _write_without)}
    return figures


def _errors(step_bias: float, written: Callable[..., tuple[Weights, Weights]]) -> list[float]:
    torch.manual_seed(0)
    key, value = (F.normalize(torch.randn(WIDTH, dtype=torch.float64), dim=0) for _ in range(2))
    values = value.expand(1, 1, CHUNK, -1)
    initial = (torch.zeros(1, WIDTH, WIDTH, dtype=torch.float64),)
    weights = momentum = (torch.zeros(1, 1, WIDTH, WIDTH, dtype=torch.float64),)
    gates = Gates(*(torch.full((1, 1, CHUNK), logit) for logit in (step_bias, 0.0, -8.0)))
    mask = torch.ones(1, CHUNK, dtype=torch.bool)
    errors = [1.0]
    for _ in range(CHUNKS):
        varied = key + NOISE * F.normalize(torch.randn(CHUNK, WIDTH, dtype=torch.float64), dim=-1)
        keys = F.normalize(varied, dim=-1)[None, None]
        weights, momentum = written(initial, weights, momentum, keys, values, gates, mask, CHUNK)
        answer = read(weights, key.view(1, 1, 1, -1)).flatten()
        errors.append(float(f"{(answer - value).norm() / value.norm():.4g}"))
    return errors


def _write_without(
    initial: Weights, weights: Weights, momentum: Weights, keys: Tensor, values: Tensor, gates: Gates, *_: object
) -> tuple[Weights, Weights]:
    """One chunk of the three equations without a trust region, for a memory of one matrix."""
    (m,), (s,) = weights, momentum
    theta, eta, alpha = (gate.sigmoid().flatten() for gate in gates)
    error = read(weights, keys) - values  # all with the weights at the start of the chunk
    for t in range(CHUNK):
        s = eta[t] * s - theta[t] * keys[..., t, :, None] * error[..., t, None, :]
        m = (1 - alpha[t]) * m + s
    return (m,), (s,)


def draw(figures: dict[str, Any]) -> Figure:
    figure, panels = style.new_figure(9, 3.0, 1, 3, sharey=True)
    for axes, name in zip(panels, STEPS, strict=True):
        axes.axhline(1, color=style.PALE, linewidth=1, zorder=0)
        axes.plot(figures[name]["without"], color=style.GREY, marker="o", markersize=3.5, label="without")
        axes.plot(figures[name]["with"], color=style.MEMORY, marker="s", markersize=3.5, label="with trust region")
        axes.set(yscale="log", ylim=(3e-3, 3e4), xlabel=f"chunks of {CHUNK} tokens", xticks=range(0, CHUNKS + 1, 2))
        axes.set_title(f"θ = {figures['theta'][name]:.3f}{' (default)' if name == 'default' else ''}")
    style.note(panels[0], "with and without: the same", (3.2, 0.55))
    panels[0].set_ylabel("relative error of what is read")
    panels[0].legend(loc="upper left")
    return figure
