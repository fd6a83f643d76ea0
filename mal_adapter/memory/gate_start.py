"""Where the gates start, so that a whole utterance has the same effect whatever its number of audio tokens."""

import math

import numpy as np

from mal_adapter.memory.config import MemoryConfig

__all__ = ["REFERENCE_TOKENS", "gate_biases"]

REFERENCE_TOKENS = 18
"""The number of audio tokens per utterance for which the default biases were chosen: that of the demo's host."""

_LARGEST_STEP = 0.9


def gate_biases(config: MemoryConfig) -> tuple[float, float, float]:
    """The biases with which the logits of step size θ, momentum η and forgetting α start.

    Without `config.utterance_tokens` they are those of the configuration. With N = `config.utterance_tokens`, an
    utterance of N tokens has the step, momentum and forgetting that one of `REFERENCE_TOKENS` R has with the biases of
    the configuration, which are θ', η' and α' per token:

        η^N = η'^R        (1 − α)^N = (1 − α')^R        θ Σ_t c_t(η, N) = θ' Σ_t c_t(η', R)

    with c_t = 1 + η + … + η^(N−t) as in `mal_adapter.memory.titans`, without forgetting.

    Args:
        config: `utterance_tokens` and the three biases are used.

    Returns:
        Logits of θ, η and α.

    Example:
        >>> many, few = (MemoryConfig(utterance_tokens=n) for n in (750, 1))
        >>> [round(1 / (1 + math.exp(-bias)), 3) for bias in gate_biases(few)]
        [0.612, 0.0, 0.006]
        >>> [round(1 / (1 + math.exp(-bias)), 5) for bias in gate_biases(many)]
        [1e-05, 0.9835, 1e-05]
    """
    biases = (config.step_bias, config.momentum_bias, config.forget_bias)
    if config.utterance_tokens in (None, REFERENCE_TOKENS):
        return biases
    tokens = config.utterance_tokens
    ratio = REFERENCE_TOKENS / tokens
    log_momentum = ratio * _log_sigmoid(config.momentum_bias)
    log_kept = ratio * _log_sigmoid(-config.forget_bias)
    log_whole = _log_sigmoid(config.step_bias) + _log_sum_of_c(_log_sigmoid(config.momentum_bias), REFERENCE_TOKENS)
    log_step = min(log_whole - _log_sum_of_c(log_momentum, tokens), math.log(_LARGEST_STEP))
    return _logit(log_step), _logit(log_momentum), -_logit(log_kept)


def _log_sum_of_c(log_momentum: float, tokens: int) -> float:
    """The logarithm of Σ_t c_t = Σ_k (N − k) η^k."""
    k = np.arange(tokens)
    return math.log(float(((tokens - k) * np.exp(k * log_momentum)).sum()))


def _log_sigmoid(logit: float) -> float:
    return min(logit, 0.0) - math.log1p(math.exp(-abs(logit)))


def _logit(log_probability: float) -> float:
    """Inverse of `_log_sigmoid`; the result is between −1e4 and 1e4."""
    if log_probability == 0:
        return 1e4
    return max(log_probability - math.log(-math.expm1(log_probability)), -1e4)
