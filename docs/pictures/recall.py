"""How well a memory recalls two voices, while both speak and after one falls silent; and forgetting alone."""

import math
from typing import Any

import style
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from mal_adapter import MemoryConfig
from mal_adapter.memory.gates import Gates
from mal_adapter.memory.rule import Weights
from mal_adapter.memory.titans import read, write

ORDER = "ABAABBABAABABBAB" + "B" * 14  # from the 16th utterance on, A is silent
TOKENS = 250  # ten seconds of Qwen2-Audio
WIDTH = 64
FORGET_BIASES = (-7.0, -8.0, -9.0, -10.0)
TOKENS_PER_S = 25
MINUTES = 10


def measure() -> dict[str, Any]:
    torch.manual_seed(0)
    config = MemoryConfig(hidden_size=WIDTH, memory_dim=WIDTH, num_heads=1)
    voices = {name: (F.normalize(torch.randn(WIDTH), dim=0), F.normalize(torch.randn(WIDTH), dim=0)) for name in "AB"}
    first, second = config.layer_shapes
    initial = (torch.randn(1, *first) / math.sqrt(first[0]), torch.zeros(1, *second))  # as in a fresh adapter
    weights = momentum = tuple(torch.zeros(1, *w.shape) for w in initial)
    gates = _gates(config.step_bias, config.momentum_bias, config.forget_bias, TOKENS)

    errors: dict[str, list[float]] = {name: [] for name in voices}
    for speaker in [*ORDER, None]:
        for name, (key, value) in voices.items():
            errors[name].append(_error(initial, weights, key, value))
        if speaker is not None:
            key, value = voices[speaker]
            keys = F.normalize(key + 0.5 / math.sqrt(WIDTH) * torch.randn(TOKENS, WIDTH), dim=-1)
            values = value + 0.5 / math.sqrt(WIDTH) * torch.randn(TOKENS, WIDTH)
            weights, momentum = _written(initial, weights, momentum, keys, values, gates, config.chunk_size)
    return {
        "order": ORDER,
        "error": {name: [round(e, 4) for e in series] for name, series in errors.items()},
        "left": {str(bias): [round(x, 4) for x in _left(bias)] for bias in FORGET_BIASES},
    }


def _gates(step: float, momentum: float, forget: float, tokens: int) -> Gates:
    return Gates(*(torch.full((1, 1, tokens), logit) for logit in (step, momentum, forget)))


def _written(
    initial: Weights, weights: Weights, momentum: Weights, keys: Tensor, values: Tensor, gates: Gates, chunk_size: int
) -> tuple[Weights, Weights]:
    mask = torch.ones(1, len(keys), dtype=torch.bool)
    return write(initial, weights, momentum, keys[None, None], values[None, None], gates, mask, chunk_size)


def _error(initial: Weights, weights: Weights, key: Tensor, value: Tensor) -> float:
    answer = read([w0 + w for w0, w in zip(initial, weights, strict=True)], key.view(1, 1, 1, -1)).flatten()
    return float((answer - value).norm() / value.norm())


def _left(forget_bias: float) -> list[float]:
    """The share of a memory that is left after each half minute of audio that writes nothing."""
    weights: Weights = (torch.eye(2).view(1, 1, 2, 2),)
    start, zero = weights[0].norm(), (torch.zeros(1, 1, 2, 2),)
    tokens = TOKENS_PER_S * 30
    left, momentum = [1.0], zero
    for _ in range(2 * MINUTES):
        nothing = torch.zeros(tokens, 2)
        gates = _gates(-50.0, 0.0, forget_bias, tokens)
        weights, momentum = _written((torch.zeros(1, 2, 2),), weights, momentum, nothing, nothing, gates, 64)
        left.append(float(weights[0].norm() / start))
    return left


def draw(figures: dict[str, Any]) -> Figure:
    figure, (recall, decay) = style.new_figure(9, 3.6, 1, 2, width_ratios=(1.7, 1))
    order = figures["order"]
    for name, color in style.SPEAKERS.items():
        error = figures["error"][name]
        recall.plot(range(len(error)), error, color=color, linewidth=1.6)
        spoken = [turn for turn, speaker in enumerate(order) if speaker == name]
        recall.scatter(
            [t + 0.5 for t in spoken], [-0.07] * len(spoken), color=color, marker="s", s=24, linewidths=0, zorder=3
        )
    silent = order.rindex("A") + 1
    recall.axvspan(silent, len(order), color=style.PALE, linewidth=0, zorder=0)
    style.note(recall, "A is silent", (silent + 0.3, 1.02))
    style.note(recall, "voice A", (silent + 3.4, figures["error"]["A"][silent + 6] + 0.04), color=style.SPEAKERS["A"])
    style.note(recall, "voice B", (silent + 5.5, figures["error"]["B"][silent + 6] + 0.05), color=style.SPEAKERS["B"])
    recall.set(
        xlabel="utterances so far (squares: who speaks)", ylabel="relative error of what is read", ylim=(-0.12, 1.1)
    )
    recall.set(xlim=(-0.3, len(order)))
    recall.set_title("Reading each voice's key after every utterance")

    shades = ("#b9c1c9", style.MEMORY, "#6b7886", style.GREY)
    for (bias, left), color in zip(figures["left"].items(), shades, strict=True):
        minutes = [step / 2 for step in range(len(left))]
        decay.plot(minutes, left, color=color, linewidth=2.2 if float(bias) == -8 else 1.4)
        at = {-7.0: 2, -8.0: 5, -9.0: 9, -10.0: 14}[float(bias)]
        name = f"{bias.removesuffix('.0').replace('-', '−')}{' (default)' if float(bias) == -8 else ''}"
        style.note(decay, name, (minutes[at] + 0.2, left[at] + 0.02), color=color)
    decay.set(
        xlabel="minutes of audio since", ylabel="share of the memory that is left", ylim=(0, 1.05), xlim=(0, MINUTES)
    )
    decay.set_title("Forgetting alone, by forget_bias")
    return figure
