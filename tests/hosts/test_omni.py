"""A memory attached through a full omni model is in its thinker, however the thinker is called.

The full model has no forward of its own: its generate() runs the thinker's, and then, for speech, a talker.
"""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from mal_adapter import AttachedMemory, MemoryState, attach_memory
from mal_adapter.errors import HostError
from tests.hosts.builders import HOSTS, WIDTH, TinyHost
from tests.hosts.probes import assert_states_close, hook_census, random_adapter, same_bits

LAYER = 1


def _qwen2_5_omni(thinker_config: Any) -> PreTrainedModel:
    # Its generate() needs a talker even when it returns no audio (5.23).
    config = transformers.Qwen2_5OmniConfig(
        thinker_config=thinker_config.to_dict(),
        talker_config={
            "embedding_size": WIDTH,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]},
        },
        token2wav_config={
            "dit_config": {
                "hidden_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "head_dim": 8,
                "emb_dim": 8,
                "num_embeds": 8,
                "mel_dim": 8,
                "enc_emb_dim": 8,
                "enc_dim": 8,
                "enc_channels": [8, 8, 8],
                "enc_kernel_sizes": [1, 1, 1],
                "enc_dilations": [1, 1, 1],
                "enc_attention_channels": 4,
                "enc_se_channels": 4,
            },
            "bigvgan_config": {
                "mel_dim": 8,
                "upsample_initial_channel": 8,
                "resblock_kernel_sizes": [3],
                "resblock_dilation_sizes": [[1, 1, 1]],
                "upsample_rates": [1],
                "upsample_kernel_sizes": [1],
            },
        },
    )
    model = transformers.Qwen2_5OmniForConditionalGeneration(config)
    model.speaker_map["Chelsie"] = {}  # from_pretrained reads the voices from a file beside the weights
    return model


def _qwen3_omni_moe(thinker_config: Any) -> PreTrainedModel:
    config = transformers.Qwen3OmniMoeConfig(thinker_config=thinker_config.to_dict(), enable_audio_output=False)
    return transformers.Qwen3OmniMoeForConditionalGeneration(config)


FULL_MODELS: dict[str, Callable[[Any], PreTrainedModel]] = {
    "qwen2_5_omni_thinker": _qwen2_5_omni,
    "qwen3_omni_moe_thinker": _qwen3_omni_moe,
}


@pytest.fixture(params=[name for name in FULL_MODELS if name in HOSTS])
def host(request: pytest.FixtureRequest) -> TinyHost:
    return HOSTS[request.param]


@pytest.fixture
def model(host: TinyHost) -> PreTrainedModel:
    """The full model around the thinker that `host.build` makes."""
    model = FULL_MODELS[host.name](host.config(3))
    model.thinker.load_state_dict(host.build(num_layers=3).state_dict())
    return model.eval()


def attach(model: PreTrainedModel) -> AttachedMemory:
    return attach_memory(model, layer_idx=LAYER, adapter=random_adapter())


def forward(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return (getattr(model, "thinker", model)(**inputs).logits,)


def generate(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The scores of three greedy tokens; from a full model, with the options for text only."""
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    if hasattr(model, "thinker"):
        options = {f"thinker_{name}": value for name, value in options.items()}
        # Qwen2.5-Omni calls it so since transformers 5, Qwen3-Omni still the old way.
        new = "return_audio" not in inspect.signature(model.generate).parameters
        options |= {"generation_mode": "text"} if new else {"return_audio": False}
    generated = model.generate(**inputs, **options)
    return (generated[0] if isinstance(generated, tuple) else generated).scores  # 4.57: with no audio beside it


def dialogue(
    host: TinyHost, model: PreTrainedModel, memory: AttachedMemory, speak: Callable, seeds: tuple[int, ...]
) -> tuple[MemoryState, tuple[Tensor, ...]]:
    """The state after one utterance per seed, and the model's answer to the last one."""
    name = str(seeds)
    for seed in seeds:
        inputs, _ = host.collate(model, [host.prompt([5], seed=seed)])
        with torch.no_grad(), memory.session(name):
            said = speak(model, inputs)
    return memory.states[name], said


@pytest.mark.parametrize("speak", [forward, generate])
def test_a_dialogue_is_the_same_through_the_full_model_and_the_thinker(
    host: TinyHost, model: PreTrainedModel, speak: Callable
):
    thinker = host.build(num_layers=3)
    memory = attach(model)
    expected, wanted = dialogue(host, thinker, attach(thinker), speak, (1, 2))
    state, said = dialogue(host, model, memory, speak, (1, 2))
    assert state.utterances.tolist() == [2]
    assert_states_close(state, expected, 0)
    assert all(same_bits(a, b) for a, b in zip(said, wanted, strict=True))
    for other_past in ((2,), (3, 2)):
        _, differently = dialogue(host, model, memory, speak, other_past)
        assert (said[0] - differently[0]).abs().max() > 1e-3


def test_all_hooks_are_in_the_thinker_and_detach_removes_them(host: TinyHost, model: PreTrainedModel):
    before = hook_census(model)
    memory = attach(model)
    assert memory.host.layers == host.layers_path
    hooked = hook_census(model)
    changed = {name for name in hooked if hooked[name] != before[name]}
    assert f"thinker.{host.layers_path}.{LAYER}" in changed
    assert all(name.partition(".")[0] == "thinker" for name in changed)
    memory.detach()
    assert hook_census(model) == before


def test_the_full_model_and_its_thinker_are_one_host(model: PreTrainedModel):
    with attach(model), pytest.raises(HostError, match="memory already"):
        attach(model.thinker)
    with attach(model.thinker), pytest.raises(HostError, match="memory already"):
        attach(model)
