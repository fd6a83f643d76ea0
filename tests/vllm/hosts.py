"""Tiny random hosts that vLLM's CPU backend takes: heads of 32, and Whisper's window of 3000 frames."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mal_adapter import MemoryAdapter, MemoryConfig
from mal_adapter.demo import HOST_FOLDER

__all__ = ["LABELS", "QUESTION", "QWEN2_AUDIO", "clip", "save_adapter", "save_audio_flamingo", "save_qwen2_audio"]

QWEN2_AUDIO = "qwen2_audio"
LABELS = ("neutral", "happy", "angry", "sad")
QUESTION = "How does the speaker feel?"
LAYER = 1
WIDTH = 64


def save_qwen2_audio(folder: Path) -> Path:
    """A Qwen2-Audio with the tokenizer of the package's host and random weights."""
    from transformers import (
        AutoTokenizer,
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        Qwen2Config,
        WhisperFeatureExtractor,
    )
    from transformers.models.qwen2_audio.configuration_qwen2_audio import Qwen2AudioEncoderConfig

    tokenizer = AutoTokenizer.from_pretrained(HOST_FOLDER)
    features = WhisperFeatureExtractor(feature_size=80, hop_length=160, chunk_length=30, return_attention_mask=True)
    template = (Path(HOST_FOLDER) / "chat_template.jinja").read_text()
    Qwen2AudioProcessor(features, tokenizer, chat_template=template).save_pretrained(folder)
    features.save_pretrained(folder)
    audio = Qwen2AudioEncoderConfig(
        num_mel_bins=80,
        d_model=WIDTH,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=WIDTH,
        max_source_positions=1500,
        initializer_range=0.1,
    )
    config = Qwen2AudioConfig(
        audio_config=audio,
        text_config=Qwen2Config(**text_sizes(len(tokenizer), pad=tokenizer.pad_token_id, end=tokenizer.eos_token_id)),
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    torch.manual_seed(0)
    Qwen2AudioForConditionalGeneration(config).save_pretrained(folder)
    rename_weights(folder)
    return folder


def save_audio_flamingo(folder: Path) -> Path:
    """An Audio Flamingo 3, whose clips are windows of 30 seconds in one tensor, with the same tokenizer."""
    from transformers import (
        AudioFlamingo3Config,
        AudioFlamingo3EncoderConfig,
        AudioFlamingo3ForConditionalGeneration,
        AudioFlamingo3Processor,
        AutoTokenizer,
        WhisperFeatureExtractor,
    )

    tokenizer = AutoTokenizer.from_pretrained(HOST_FOLDER)
    features = WhisperFeatureExtractor(feature_size=80, hop_length=160, chunk_length=30, return_attention_mask=True)
    template = (Path(HOST_FOLDER) / "chat_template.jinja").read_text()
    AudioFlamingo3Processor(features, tokenizer, template, audio_token="<|AUDIO|>").save_pretrained(folder)
    features.save_pretrained(folder)
    audio = AudioFlamingo3EncoderConfig(
        num_mel_bins=80,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=WIDTH,
        max_source_positions=1500,
        initializer_range=0.1,
    )
    config = AudioFlamingo3Config(
        audio_config=audio,
        text_config={
            "model_type": "qwen2",
            **text_sizes(len(tokenizer), pad=tokenizer.pad_token_id, end=tokenizer.eos_token_id),
        },
        audio_token_id=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    torch.manual_seed(0)
    AudioFlamingo3ForConditionalGeneration(config).save_pretrained(folder)
    rename_weights(folder)
    return folder


def rename_weights(folder: Path) -> None:
    """transformers 5.19 writes a model that was not loaded with names that neither it nor vLLM reads."""
    weights = folder / "model.safetensors"
    tensors = {name.replace("model.model.", "model."): tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})


def text_sizes(vocab_size: int, *, pad: int, end: int) -> dict[str, Any]:
    """The sizes of a tiny language model."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.12,
        "tie_word_embeddings": False,
        "pad_token_id": pad,
        "bos_token_id": None,
        "eos_token_id": end,
    }


def save_adapter(folder: Path, model_type: str, *, trained: bool = True) -> Path:
    """An adapter for such a host; with random weights in the read-out it changes every answer clearly."""
    torch.manual_seed(1)
    adapter = MemoryAdapter(MemoryConfig(hidden_size=WIDTH, memory_dim=32, num_heads=2, step_bias=-1.0))
    if trained:
        with torch.no_grad():
            adapter.readout_out.weight.normal_(std=0.5)
    adapter.metadata = type(adapter.metadata)(
        layer_idx=LAYER, model_type=model_type, hidden_size=WIDTH, num_hidden_layers=4
    ).with_task(LABELS, QUESTION)
    adapter.eval().save_pretrained(folder)
    return folder


def clip(seed: int, seconds: float = 0.6) -> "torch.Tensor":
    """A sound of some tones, (samples,) float32 at 16 kHz; different for each seed."""
    generator = torch.Generator().manual_seed(seed)
    time_s = torch.arange(int(16_000 * seconds)) / 16_000
    tones = 100 + 1500 * torch.rand(5, generator=generator)
    return 0.1 * (2 * torch.pi * tones[:, None] * time_s).sin().sum(0)
