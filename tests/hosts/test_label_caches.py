"""Label scores on the caches of language models that audio hosts use now or may use later, and without a cache;
and the hosts that are refused when the recogniser is made."""

import inspect

import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from mal_adapter import MemoryConfig, attach_memory
from mal_adapter.errors import HostError
from mal_adapter.ser.recognizer import EmotionRecognizer
from mal_adapter.ser.recognizer.scoring import LabelScorer, continuation
from tests.hosts.builders import ADDITIVE_HOSTS, AdditiveHost
from tests.hosts.spelling import END_ID, ByLetter
from tests.hosts.tiny import LEGACY, _spread, text

NAMES = ("ab", "abc", "abd", "q", "xyzwv")
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
MODELS = {  # name -> how its tokens are passed, and its config
    "Mistral": ("at once", {"sliding_window": 8}),
    "Gemma2": ("at once", {"sliding_window": 8, "head_dim": 8}),
    "Lfm2": ("by token", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "Qwen3Next": (
        "by token",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 8,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 2,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "FalconH1": ("by token", {**MAMBA, "mamba_d_ssm": 64}),
    "Bamba": ("by token", {**MAMBA, "attn_layer_indices": [1], "head_dim": 8}),
    "RecurrentGemma": (
        "again",
        {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 16, "head_dim": 8},
    ),
    "Mamba2": ("again", {"head_dim": 16, "num_heads": 4, "state_size": 8, "n_groups": 1, "chunk_size": 8}),
}


def language_model(name: str):
    config_class = getattr(transformers, f"{name}Config")
    options = {**text(2), **MODELS[name][1]}
    if name == "Mamba2":
        options = {n: v for n, v in options.items() if "attention" not in n and "key_value" not in n}
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config_class(**options)).eval()
    _spread(model)
    return model


@pytest.mark.skipif(LEGACY, reason="the hybrid caches of transformers 4 are classes of each model")
@pytest.mark.parametrize("name", MODELS)
def test_scores_and_gradients_are_those_of_whole_forwards(name):
    model, (way, _) = language_model(name), MODELS[name]
    ids = torch.randint(1, 50, (2, 19))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    scorer = LabelScorer(ByLetter.tokenizer, NAMES, "", [END_ID])

    def run_again(tokens):
        longer = torch.cat((ids, tokens.expand(2, -1)), 1)
        whole = torch.cat((mask, torch.ones(2, len(tokens), dtype=mask.dtype)), 1)
        return model(input_ids=longer, attention_mask=whole, use_cache=False).logits[:, -len(tokens) :]

    def scores(run_again):
        outputs = model(**inputs, use_cache=True)
        cache = getattr(outputs, "past_key_values", None)
        assert continuation(cache, 19) == way
        logits, positions = outputs.logits[:, -1], inputs.get("position_ids")
        return scorer.log_probs(model, logits, cache, mask, positions, run_again)

    first = model(**inputs, use_cache=False).logits[:, -1].log_softmax(-1)
    expected = []
    for tokens in scorer.token_ids:
        log_probs = run_again(torch.tensor(tokens)).log_softmax(-1)
        between = sum(log_probs[:, n, token] for n, token in enumerate(tokens[1:]))
        expected.append(first[:, tokens[0]] + between + log_probs[:, -1, END_ID])
    expected = torch.stack(expected, 1)
    with torch.no_grad():
        assert (scores(run_again) - expected).abs().max() < 1e-4
    embeddings = model.get_input_embeddings().weight
    found = scores(run_again)
    assert (found - expected).abs().max() < 1e-4
    ours, theirs = (torch.autograd.grad(s[:, 2].sum(), embeddings)[0] for s in (found, expected))
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    if way == "again":
        with torch.no_grad(), pytest.raises(HostError, match="several tokens"):
            scores(None)


def test_a_cache_counts_only_if_it_holds_the_prompt():
    config = transformers.MistralConfig(**text(2))
    cache, static = DynamicCache(), StaticCache(config, max_cache_len=8)
    keys = torch.zeros(1, 2, 5, 8)
    assert continuation(None, 5) == continuation(((keys, keys),), 5) == continuation(cache, 5) == "again"
    cache.update(keys, keys, 0)
    static.update(keys, keys, 0, {"cache_position": torch.arange(5)})
    assert continuation(cache, 5) == continuation(static, 5) == "at once"
    assert continuation(cache, 4) == continuation(cache, 6) == "again"  # the host dropped or added positions
    assert continuation(EncoderDecoderCache(cache, DynamicCache()), 5) == "again"


def refused(model, processor, labels, **options) -> str:
    ran = []
    model.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(HostError, match="labels of several tokens") as error:
        EmotionRecognizer(model, processor, labels=labels, **options)
    assert not ran
    return str(error.value)


@pytest.mark.parametrize("host", ADDITIVE_HOSTS.values(), ids=ADDITIVE_HOSTS)
def test_a_streaming_host_is_refused_when_the_recogniser_is_made(host: AdditiveHost):
    model = host.build()
    message = refused(model, ByLetter(), ("a", "bc"))
    assert type(model).__name__ in message
    assert "'bc'" in message
    assert "every position" in message
    memory = attach_memory(model, 0, config=MemoryConfig(hidden_size=32, memory_dim=8, num_heads=2))
    refused(model, ByLetter(), ("a", "bc"), memory=memory)
    assert not EmotionRecognizer(model, ByLetter(), labels=("a", "b")).labels_need_cache


def test_an_encoder_decoder_is_refused_when_the_recogniser_is_made():
    config = transformers.WhisperConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, max_source_positions=8, num_mel_bins=8,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    assert "decoder of its own" in refused(model, ByLetter(), ("ab", "c"))
