"""What is refused before anything is hooked or opened, and that the error says what to give instead."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from mal_adapter import attach_memory
from mal_adapter.errors import AudioMaskError, ConfigError, SessionError
from mal_adapter.stores import InMemoryStore
from tests.hosts.builders import HOSTS
from tests.hosts.probes import random_adapter


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return HOSTS["qwen2_audio"].build()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a", "b"}, "have no order; give them in the order of the batch's rows"),
        (42, "session id 42 is not a non-empty string"),
        (["a", 42], "session id 42 is not"),
        ("", "session id '' is not"),
        ([], "expected one id, a sequence"),
        (["a", None], "expected one id, a sequence"),
        (["a", "a"], "not distinct"),
    ],
)
def test_what_are_no_session_ids_is_refused_and_nothing_is_left_open(model, given, message):
    with attach_memory(model, 0) as memory:
        with pytest.raises(SessionError, match=message), memory.session(given):
            pass
        with memory.session(np.array(["a", "b"])) as session:  # any order of strings will do
            assert session.ids == ("a", "b")


def test_a_mask_is_a_bool_tensor_with_a_row_per_session(model):
    with attach_memory(model, 0) as memory:
        for mask, given in (
            ([[True]], "list"),
            (torch.ones(1, 3), "torch.float32"),
            (torch.ones(2, 3).bool(), r"torch.bool \(2"),
        ):
            with pytest.raises(AudioMaskError, match=rf"audio_mask is {given}.* expected a bool tensor \(1, seq_len\)"):
                memory.session("a", audio_mask=mask).__enter__()


def test_an_adapter_that_was_never_attached_says_how_to_record_its_layer(model, tmp_path):
    # as after an own training loop on hidden states
    own = random_adapter(model.config.get_text_config().hidden_size)
    assert own.metadata.layer_idx is None
    own.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"does not record the layer .* dataclasses\.replace"):
        attach_memory(model, adapter=tmp_path)
    attach_memory(model, 1, adapter=tmp_path).detach()
    own.metadata = dataclasses.replace(own.metadata, layer_idx=1)  # what the message says
    own.save_pretrained(tmp_path)
    with attach_memory(model, adapter=tmp_path) as memory:
        assert memory.layer_idx == 1


def test_an_adapter_stays_at_its_layer_unless_it_is_told_to_move(model):
    with attach_memory(model, 0, adapter=random_adapter()) as memory:
        adapter = memory.adapter
    with pytest.raises(ConfigError, match="trained at layer 0, and layer_idx=1 is another one; leave layer_idx out"):
        attach_memory(model, 1, adapter=adapter)
    assert adapter.metadata.layer_idx == 0
    adapter.metadata = dataclasses.replace(adapter.metadata, layer_idx=None)
    with attach_memory(model, 1, adapter=adapter) as memory:
        assert memory.adapter.metadata.layer_idx == 1


def test_what_is_no_store_config_or_layer_is_refused_before_anything_is_hooked(model):
    with pytest.raises(ConfigError, match="store is a dict without put, drop; give a SessionStore, a folder"):
        attach_memory(model, 0, store={})
    with pytest.raises(ConfigError, match="config is a dict, expected a MemoryConfig"):
        attach_memory(model, 0, config={"memory_dim": 64})
    with pytest.raises(ConfigError, match=r"layer_idx='my-memory' .* a trained memory is given as adapter="):
        attach_memory(model, "my-memory")
    with attach_memory(model, 0, store=InMemoryStore()):  # no hook was left behind
        pass
