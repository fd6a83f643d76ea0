"""The gates start so that an utterance has the same effect whatever its number of tokens."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mal_adapter import MemoryAdapter, MemoryConfig
from mal_adapter.errors import ConfigError
from mal_adapter.memory.gate_start import REFERENCE_TOKENS, gate_biases


def gates_of(config: MemoryConfig) -> list[float]:
    return torch.tensor(gate_biases(config), dtype=torch.float64).sigmoid().tolist()


def after_an_utterance(tokens: int, config: MemoryConfig) -> tuple[float, float, float]:
    """(Step towards the value, share of an old momentum, share of an old deviation) after equal tokens, one by one.

    The gradient is taken at the weights before the utterance, as in one chunk.
    """
    step, momentum, forget = gates_of(config)
    weight, moving, carried = 0.0, 0.0, 1.0
    for _ in range(tokens):
        moving = momentum * moving + step
        weight += moving
        carried *= momentum
    return weight, carried, (1 - forget) ** tokens


@given(st.integers(1, 1500), st.floats(-6, -3), st.floats(-2, 2), st.floats(-10, -4))
def test_a_whole_utterance_has_the_same_effect(tokens: int, step: float, momentum: float, forget: float):
    biases = {"step_bias": step, "momentum_bias": momentum, "forget_bias": forget}
    expected = after_an_utterance(REFERENCE_TOKENS, MemoryConfig(**biases))
    found = after_an_utterance(tokens, MemoryConfig(utterance_tokens=tokens, **biases))
    assert found[1:] == pytest.approx(expected[1:], rel=1e-6, abs=1e-12)
    if gates_of(MemoryConfig(utterance_tokens=tokens, **biases))[0] < 0.9 - 1e-9:
        assert found[0] == pytest.approx(expected[0], rel=1e-6)
    else:  # a token can't take a larger step
        assert found[0] < expected[0]


@given(st.integers(1, 2**14), st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_any_biases_are_finite_logits(tokens: int, step: float, momentum: float, forget: float):
    config = MemoryConfig(utterance_tokens=tokens, step_bias=step, momentum_bias=momentum, forget_bias=forget)
    assert all(math.isfinite(bias) and abs(bias) <= 1e4 for bias in gate_biases(config))


def test_an_adapter_starts_with_these_gates():
    config = MemoryConfig(hidden_size=8, memory_dim=4, num_heads=2, utterance_tokens=1)
    started = MemoryAdapter(config)
    later = MemoryAdapter(MemoryConfig(hidden_size=8, memory_dim=4, num_heads=2))
    later.start_gates(1)
    assert later.config == config
    assert torch.equal(started.in_proj.bias[-6:], later.in_proj.bias[-6:])
    assert_close(started.in_proj.bias[-6:].unflatten(0, (3, 2))[:, 0], torch.tensor(gate_biases(config)))
    with pytest.raises(ConfigError, match="utterance_tokens=0"):
        later.start_gates(0)
