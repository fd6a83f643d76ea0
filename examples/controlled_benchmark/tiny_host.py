"""A tiny but genuine Qwen2-Audio: tokenizer, processor and model, from nothing to an ordinary model folder.

Its prompt is one utterance, then a question about it. The folder loads like any other model's:

    model, processor = mal_adapter.ser.loading.load_host(folder)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from questions import tokenizer_corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2_audio.configuration_qwen2_audio import Qwen2AudioEncoderConfig

__all__ = [
    "CHUNK_LENGTH_S",
    "HOP_LENGTH",
    "MEL_BINS",
    "audio_tokens",
    "build_feature_extractor",
    "build_model",
    "build_processor",
    "build_tokenizer",
    "prompt_text",
    "save_host",
    "tower_output",
]

HOP_LENGTH = 320  # samples (20 ms); after the encoder's two halvings one audio token is 80 ms
CHUNK_LENGTH_S = 6  # the longest audio the host accepts, in seconds
N_FFT = 1024  # samples (64 ms): Whisper's 25 ms window hardly resolves the harmonics of a low voice
MEL_BINS = 80

_PAD, _IM_START, _IM_END = "<|pad|>", "<|im_start|>", "<|im_end|>"
_AUDIO, _AUDIO_BOS, _AUDIO_EOS = "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"
SPECIAL_TOKENS = [_PAD, _IM_START, _IM_END, _AUDIO, _AUDIO_BOS, _AUDIO_EOS]

# Qwen2-Audio's chat format without its fixed English system message, which would only lengthen every sequence.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'audio' or 'audio' in content or 'audio_url' in content %}"
    "<|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(texts: Iterable[str] | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text encodes without an unknown token.

    Args:
        texts: Every word of them becomes one token; the benchmark's questions and answers unless given.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,  # an upper bound: merging stops when every word of the corpus is one token
        min_frequency=1,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_corpus() if texts is None else texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_IM_END,
        additional_special_tokens=SPECIAL_TOKENS[1:],
        padding_side="left",
        model_max_length=1024,
        model_input_names=["input_ids", "attention_mask"],  # before transformers 5, token_type_ids by default
    )


def build_feature_extractor() -> WhisperFeatureExtractor:
    """Whisper's log-mel features, with longer windows and hops."""
    return WhisperFeatureExtractor(
        feature_size=MEL_BINS,
        hop_length=HOP_LENGTH,
        chunk_length=CHUNK_LENGTH_S,
        n_fft=N_FFT,
        return_attention_mask=True,
    )


def build_processor(
    extractor: WhisperFeatureExtractor | None = None, texts: Iterable[str] | None = None
) -> Qwen2AudioProcessor:
    """The processor: feature extractor, tokenizer and chat template.

    Args:
        extractor: Of another encoder's features.
        texts: As in `build_tokenizer`.
    """
    extractor = extractor or build_feature_extractor()
    return Qwen2AudioProcessor(extractor, build_tokenizer(texts), chat_template=CHAT_TEMPLATE)


def build_model(
    tokenizer: Any,
    seed: int,
    width: int = 96,
    decoder_layers: int = 4,
    audio: Qwen2AudioEncoderConfig | None = None,
    dropout: float = 0.0,
) -> Qwen2AudioForConditionalGeneration:
    """An untrained host with random weights from `seed`; by default of about 0.8 M parameters.

    Args:
        audio: Of another audio tower.
        dropout: Of the decoder's attention, in training.
    """
    audio = audio or Qwen2AudioEncoderConfig(
        num_mel_bins=MEL_BINS,
        d_model=width,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=3 * width,
        max_source_positions=CHUNK_LENGTH_S * 16_000 // HOP_LENGTH // 2,
        initializer_range=0.06,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=decoder_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.06,
        attention_dropout=dropout,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = Qwen2AudioConfig(
        audio_config=audio, text_config=text, audio_token_index=tokenizer.convert_tokens_to_ids(_AUDIO)
    )
    torch.manual_seed(seed)
    model = Qwen2AudioForConditionalGeneration(config)
    with torch.no_grad():  # the class leaves its frozen positions random; Whisper's are sinusoids
        positions = model.get_parameter("model.audio_tower.embed_positions.weight")
        positions.copy_(0.2 * _sinusoids(*positions.shape))
    generation = model.generation_config
    generation.pad_token_id, generation.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    return model


def prompt_text(processor: Qwen2AudioProcessor, question: str) -> str:
    """The chat prompt of one audio followed by one question, up to where the answer starts."""
    message = {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": question}]}
    return str(processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False))


def save_host(model: Qwen2AudioForConditionalGeneration, processor: Qwen2AudioProcessor, folder: str | Path) -> None:
    """Write an ordinary model folder: config, safetensors, tokenizer and processor files."""
    folder = Path(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # transformers 5 reads what 4.57 wrote, but not the other way round: a class name, a key, and a file of its own.
    processor.feature_extractor.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def audio_tokens(
    model: Qwen2AudioForConditionalGeneration, mels: Float[Tensor, "batch mel_bins frames"], frames: int
) -> Float[Tensor, "batch audio_tokens width"]:
    """The audio embeddings that the model's own forward computes, without the work on padding.

    The encoder attends to valid frames only, so frames after the audio matter only through the first convolutions, two
    frames deep. Leaving the rest out is the same function at a fifth of the time.

    Args:
        mels: log-mel features, with at least two frames more than are valid.
        frames: valid feature frames, the same for the whole batch.

    Returns:
        Embeddings at the audio positions.
    """
    embeddings: Tensor = model.model.multi_modal_projector(tower_output(model, mels, frames))
    return embeddings


def tower_output(
    model: Qwen2AudioForConditionalGeneration, mels: Float[Tensor, "batch mel_bins frames"], frames: int
) -> Float[Tensor, "batch audio_tokens tower_width"]:
    """What the audio tower gives to the projector; see `audio_tokens`."""
    tower = model.model.audio_tower
    after_convolutions = (frames - 1) // 2 + 1
    hidden = torch.nn.functional.gelu(tower.conv1(mels))
    hidden = torch.nn.functional.gelu(tower.conv2(hidden)).transpose(1, 2)[:, :after_convolutions]
    hidden = hidden + tower.embed_positions.weight[:after_convolutions]
    for layer in tower.layers:
        hidden = layer(hidden, None)
    hidden = tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2)
    normed: Tensor = tower.layer_norm(hidden)
    return normed


def _sinusoids(length: int, width: int) -> Float[Tensor, "{length} {width}"]:
    """Whisper's positions: sines then cosines of geometric frequencies."""
    rates = torch.exp(-math.log(10_000.0) / (width // 2 - 1) * torch.arange(width // 2))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
