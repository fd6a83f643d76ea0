"""Hosts whose last layers reuse the keys and values of earlier ones (Gemma 3n, Gemma 4): a memory belongs before them.

Of six layers here the last three reuse those of the first three.
"""

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from mal_adapter import attach_memory
from mal_adapter.errors import ConfigError
from tests.hosts.builders import HOSTS, TinyHost
from tests.hosts.probes import changing, random_adapter, trace_layers

OWN, SHARED = 3, 3
SHARING = [HOSTS[name] for name in ("gemma3n", "gemma4", "gemma4_unified") if name in HOSTS]


@pytest.fixture(params=SHARING, ids=lambda host: host.name)
def host(request: pytest.FixtureRequest) -> TinyHost:
    config = functools.partial(request.param.config, num_kv_shared_layers=SHARED)
    return dataclasses.replace(request.param, config=config)


def positions_that_differ(a: Tensor, b: Tensor) -> list[int]:
    """The positions at which two batches of one row of logits differ."""
    return (a != b).any(-1)[0].nonzero().flatten().tolist()


@torch.no_grad()
def test_a_change_at_audio_positions_in_the_shared_layers_reaches_no_other_position(host: TinyHost):
    """A fact of the host itself: no later layer makes keys or values from it."""
    model = host.build(num_layers=OWN + SHARED)
    inputs, audio_mask = host.make_inputs(model, [[4]])
    bare = model(**inputs).logits
    disturb = changing(lambda hidden_states: hidden_states + torch.randn_like(hidden_states) * audio_mask[..., None])
    for layer_idx, layer in enumerate(host.layers(model)):
        handle = layer.register_forward_hook(disturb)
        changed = set(positions_that_differ(model(**inputs).logits, bare))
        handle.remove()
        audio = set(audio_mask[0].nonzero().flatten().tolist())
        assert (changed <= audio) == (layer_idx >= OWN - 1), layer_idx


@torch.no_grad()
def test_generate_reads_and_writes_a_memory_before_the_shared_layers(host: TinyHost):
    model = host.build(num_layers=OWN + SHARED)
    inputs, audio_mask = host.make_inputs(model, [[10]])
    bare = model(**inputs).logits[:, -1]
    for layer_idx in range(OWN - 1):
        with attach_memory(model, layer_idx=layer_idx, adapter=random_adapter()) as memory:
            with memory.session("call"):
                model.generate(**inputs, max_new_tokens=3, do_sample=False)
                assert (model(**inputs).logits[:, -1] - bare).abs().max() > 1e-3
            assert memory.states["call"].tokens.tolist() == [2 * int(audio_mask.sum())]


@torch.no_grad()
def test_generate_may_run_the_shared_layers_at_the_last_position_only(host: TinyHost):
    """A memory there could not even write, because Gemma 4 drops the positions that it no longer needs."""
    model = host.build(num_layers=OWN + SHARED)
    inputs, audio_mask = host.make_inputs(model, [[4]])
    with trace_layers(host.layers(model), host.stream_idx) as calls:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    lengths = [call.hidden_out.shape[1] for call in calls]
    assert lengths[:OWN] == [audio_mask.shape[1]] * OWN
    assert lengths[OWN:] == [audio_mask.shape[1] if host.name == "gemma3n" else 1] * SHARED


def test_a_memory_in_the_shared_layers_is_refused(host: TinyHost):
    model = host.build(num_layers=OWN + SHARED)
    for layer_idx in range(OWN, OWN + SHARED):
        with pytest.raises(ConfigError, match=f"0 … {OWN - 1}"):
            attach_memory(model, layer_idx=layer_idx, adapter=random_adapter())
