"""Detection of a host's layers, width and audio positions.

Every test of this folder runs on every family of `builders.HOSTS`. The adapter is random rather than trained: its
residual is large, so a position that should not change and does is seen at once.
"""

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from mal_adapter.errors import HostError
from mal_adapter.hosts.detect import unwrap
from mal_adapter.hosts.host import detect_host
from tests.hosts.behaviour.common import LAYER, SIDES, attach
from tests.hosts.builders import AUDIO_TOKEN_ID, WIDTH, TinyHost
from tests.hosts.probes import trace_layers


def test_detection_finds_layers_width_and_placeholder(host: TinyHost, model: PreTrainedModel):
    with attach(model) as memory:
        assert memory.host.layers == host.layers_path
        assert memory.host.hidden_size == WIDTH
        assert memory.host.audio_token_id == AUDIO_TOKEN_ID
        assert memory.host.mask_module == host.multimodal_path
        assert memory.layer_idx == LAYER


def test_decoder_layers_are_distinguished_from_other_stacks_of_the_same_length(host: TinyHost, model: PreTrainedModel):
    """An audio encoder may be as deep as the decoder."""
    stacks = {len(module) for module in model.modules() if isinstance(module, nn.ModuleList)}
    for count in stacks - {0}:
        assert detect_host(unwrap(host.build(num_layers=count))).layers == host.layers_path


def test_an_object_that_is_not_a_model_is_refused_by_name():
    with pytest.raises(HostError, match="the model is 'user/model', not a torch module; load it first"):
        unwrap("user/model")
    with pytest.raises(HostError, match="the model is NoneType"):
        unwrap(None)


@SIDES
@torch.no_grad()
def test_trap_14_the_audio_mask_matches_where_the_host_puts_audio(
    host: TinyHost, model: PreTrainedModel, padding_side: str
):
    """Checked by where the residual is added, and by how many tokens are counted as written."""
    inputs, audio_mask = host.make_inputs(model, [[4], [7, 2], [3]], padding_side=padding_side)
    with trace_layers(host.layers(model), host.stream_idx) as bare:
        model(**inputs)
    memory = attach(model)
    with memory.session(["a", "b", "c"]), trace_layers(host.layers(model), host.stream_idx) as attached:
        model(**inputs)
    changed = (bare[LAYER].hidden_out != attached[LAYER].hidden_out).any(-1)
    assert torch.equal(changed, audio_mask)
    assert [int(memory.states[name].tokens) for name in "abc"] == audio_mask.sum(-1).tolist()
