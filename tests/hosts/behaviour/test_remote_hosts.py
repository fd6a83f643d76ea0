"""Ultravox and Step-Audio 2 generate like the families of transformers, so the same tests run on them."""

import contextlib
from importlib import import_module
from pathlib import Path

import pytest

from tests.hosts.remote.step_audio_2 import STEP_AUDIO_2
from tests.hosts.remote.ultravox import ULTRAVOX
from tests.hosts.test_builders import CHECKS

BOTH = {
    "test_detection_finds_layers_width_and_placeholder": "there is no placeholder id; test_remote.py has its own test",
    "test_embeddings_alone_have_audio_only_with_a_users_mask": "forward raises without input_ids",
    "test_features_with_embeddings_are_audio_only_if_the_host_merges_them": "forward raises without input_ids",
    "test_gradient_checkpointing_changes_neither_state_nor_gradients": "merges in place, see test_remote.py",
    "test_the_gradient_through_two_utterances_equals_the_finite_difference": "float32 norms drown the slope in 4.57",
    "test_generate_continues_a_conversation_on_its_cache": "the prompt's spans, or no cache; see test_remote.py",
}
EXCEPT = {
    ULTRAVOX: BOTH,
    STEP_AUDIO_2: BOTH
    | {
        "test_trap_08_output_hidden_states_shows_the_residual": "it returns none",
        "test_trap_05_a_generated_placeholder_id_is_not_audio": "no decode step on a cache",
        "test_a_second_turn_on_a_cache_without_audio_writes_nothing": "no cache",
        "test_trap_06_a_second_turn_on_a_cache_writes_only_its_own_audio": "no cache",
    },
}
"""Tests that do not apply to a host, and why."""

FILES = [path.stem for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__)]
TESTS = {
    name: test
    for file in FILES
    for name, test in vars(import_module(f"tests.hosts.behaviour.{file}")).items()
    if name.startswith("test_")
}
globals().update({name: test for name, test in TESTS.items() if name not in BOTH})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "host" in metafunc.fixturenames:
        hosts = [host for host, names in EXCEPT.items() if metafunc.definition.originalname not in names]
        metafunc.parametrize("host", hosts, ids=lambda host: host.name)


def test_ultravox_itself_shows_hidden_states_unless_its_literal_excludes_it():
    with pytest.raises(AssertionError) if "hidden_states" in ULTRAVOX.cannot else contextlib.nullcontext():
        CHECKS["hidden_states"](ULTRAVOX)


def test_exceptions_name_tests_that_exist():
    for names in EXCEPT.values():
        assert names.keys() <= TESTS.keys()
