"""A tiny random Voxtral in both forms of the real checkpoint: transformers' files, and Mistral's, which vLLM loads."""

import base64
import json
import re
import runpy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import mal_adapter
from tests.vllm.engines import Ask
from tests.vllm.hosts import QUESTION, WIDTH, rename_weights, text_sizes
from tests.vllm.servers import wav

__all__ = ["save_voxtral", "voxtral_for_transformers", "voxtral_for_vllm"]

TINY = runpy.run_path(str(Path(mal_adapter.__file__).parents[1] / "examples" / "_tiny_voxtral.py"))
HEADS, HEAD = 2, 32
NAMES = {
    r"model\.audio_tower\.": "mm_whisper_embeddings.whisper_encoder.",
    r"whisper_encoder\.conv([12])": lambda found: f"whisper_encoder.conv_layers.{int(found[1]) - 1}",
    r"whisper_encoder\.layer": "whisper_encoder.transformer.layer",
    r"transformer\.layer_norm": "transformer.norm",
    r"model\.multi_modal_projector\.linear_1": "mm_whisper_embeddings.audio_language_projection.0",
    r"model\.multi_modal_projector\.linear_2": "mm_whisper_embeddings.audio_language_projection.2",
    r"model\.language_model\.embed_tokens": "mm_whisper_embeddings.tok_embeddings",
    r"model\.language_model\.": "",
    r"lm_head": "output",
    r"self_attn_layer_norm|input_layernorm": "attention_norm",
    r"post_attention_layernorm|final_layer_norm": "ffn_norm",
    r"self_attn\.([qkv])_proj": r"attention.w\1",
    r"self_attn\.o(ut)?_proj": "attention.wo",
    r"layers\.(\d+)\.(mlp\.gate_proj|fc1)": r"layers.\1.feed_forward.w1",
    r"layers\.(\d+)\.(mlp\.down_proj|fc2)": r"layers.\1.feed_forward.w2",
    r"mlp\.up_proj": "feed_forward.w3",
}
"""From transformers' names of weights to Mistral's, one after the other."""


def save_voxtral(folder: Path) -> Path:
    """A Voxtral with the tokenizer of the examples. A clip of up to 30 seconds is 375 tokens."""
    from transformers import VoxtralConfig, VoxtralForConditionalGeneration, WhisperFeatureExtractor
    from transformers.models.whisper.modeling_whisper import sinusoids

    config = VoxtralConfig(
        audio_config={
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,  # four frames of the encoder make one token
            "num_hidden_layers": 1,
            "num_attention_heads": HEADS,
            "num_mel_bins": TINY["MEL_BINS"],
            "max_source_positions": 1500,
            "initializer_range": 0.1,
        },
        text_config={
            **text_sizes(TINY["VOCAB_SIZE"], pad=11, end=2),
            "model_type": "llama",
            "head_dim": HEAD,
            "bos_token_id": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        audio_token_id=TINY["AUDIO_ID"],
    )
    torch.manual_seed(0)
    model = VoxtralForConditionalGeneration(config)
    positions = model.model.audio_tower.embed_positions.weight
    with torch.no_grad():
        positions.copy_(sinusoids(*positions.shape))  # as the real one has them; Mistral's files leave them out
    model.save_pretrained(folder)
    rename_weights(folder)
    WhisperFeatureExtractor(feature_size=TINY["MEL_BINS"], processor_class="VoxtralProcessor").save_pretrained(folder)
    (folder / "tekken.json").write_text(json.dumps(TINY["_tokenizer"]()))
    tensors = {
        mistral_name(name): interleaved(name, tensor).contiguous()
        for name, tensor in model.state_dict().items()
        if "embed_positions" not in name
    }
    save_file(tensors, folder / "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps(params(config)))
    return folder


def mistral_name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = re.sub(ours, theirs, name)
    return name


def interleaved(name: str, tensor: Tensor) -> Tensor:
    """RoPE of Mistral's files rotates row 2i of a head with row 2i + 1; transformers' row i with row i + half."""
    if not re.search(r"language_model.*\.[qk]_proj", name):
        return tensor
    return tensor.view(-1, 2, HEAD // 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


def params(config: Any) -> dict[str, Any]:
    """Mistral's configuration."""
    text, audio = config.text_config, config.audio_config
    sound = {"sampling_rate": 16_000, "num_mel_bins": audio.num_mel_bins, "hop_length": 160, "window_size": 400}
    encoder = {
        "audio_encoding_args": sound,
        "dim": audio.hidden_size,
        "n_layers": audio.num_hidden_layers,
        "head_dim": HEAD,
        "hidden_dim": audio.intermediate_size,
        "n_heads": audio.num_attention_heads,
        "vocab_size": audio.vocab_size,
        "max_source_positions": audio.max_source_positions,
    }
    return {
        "dim": text.hidden_size,
        "n_layers": text.num_hidden_layers,
        "head_dim": HEAD,
        "hidden_dim": text.intermediate_size,
        "n_heads": text.num_attention_heads,
        "n_kv_heads": text.num_key_value_heads,
        "rope_theta": text.rope_parameters["rope_theta"],
        "norm_eps": text.rms_norm_eps,
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.max_position_embeddings,
        "multimodal": {
            "whisper_model_args": {"encoder_args": encoder, "downsample_args": {"downsample_factor": 4}},
        },
    }


def voxtral_for_transformers(processor: Any, ask: Ask) -> Any:
    """A request's prompt, as the inputs of a model in transformers."""
    content: list[dict[str, str]] = [
        {"type": "audio", "base64": base64.b64encode(wav(samples)).decode()} for samples in ask.audio
    ]
    message = {"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}
    return processor.apply_chat_template([message])


def voxtral_for_vllm(processor: Any, ask: Ask) -> dict[str, Any]:
    """The same prompt, as `vllm.LLM` takes it."""
    ids = voxtral_for_transformers(processor, ask)["input_ids"][0].tolist()
    audio = [(samples, 16_000) for samples in ask.audio]
    return {"prompt_token_ids": ids, "multi_modal_data": {"audio": audio} if audio else {}}
