"""MemoryConfig refuses invalid fields with a ConfigError that names them."""

import dataclasses
import json

import pytest

from mal_adapter import MemoryConfig
from mal_adapter.errors import ConfigError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", 2.0),
        ("memory_dim", -4),
        ("memory_dim", 30),  # not a multiple of 4 heads
        ("num_heads", True),
        ("depth", 3),
        ("expansion", 0),
        ("chunk_size", "64"),
        ("readout_dim", 0),
        ("pool_utterance", 1),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("step_bias", float("nan")),
        ("forget_bias", float("-inf")),
    ],
)
def test_a_bad_field_is_named(field, value):
    with pytest.raises(ConfigError, match=field):
        MemoryConfig(**{"hidden_size": 32, field: value})


def test_it_is_immutable_and_equal_after_a_round_trip_through_json():
    config = MemoryConfig(hidden_size=32, memory_dim=48, num_heads=3, depth=1, readout_dim=7)
    assert MemoryConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.depth = 2


def test_unknown_and_missing_fields_are_refused():
    with pytest.raises(ConfigError, match="hidden_sise"):
        MemoryConfig.from_dict({"hidden_size": 32, "hidden_sise": 32})
    with pytest.raises(ConfigError, match="hidden_size"):
        MemoryConfig.from_dict({"depth": 2})
