"""A random Voxtral of 300 kB in the form of the real checkpoint: to try what loads one; it understands nothing."""

import base64
import json
from pathlib import Path

import torch
from transformers import VoxtralConfig, VoxtralForConditionalGeneration, WhisperFeatureExtractor

from mal_adapter.demo import EMOTIONS

WIDTH = 32
MEL_BINS = 16
AUDIO_ID = 24  # VoxtralProcessor takes it for granted
SPECIAL_TOKENS = [
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "[AUDIO]",
    "[BEGIN_AUDIO]", "[TRANSCRIBE]",
]  # fmt: skip
PIECES = [bytes([byte]) for byte in range(256)] + [word.encode() for word in EMOTIONS]
VOCAB_SIZE = len(SPECIAL_TOKENS) + len(PIECES)


def save_tiny_voxtral(folder: Path) -> str:
    """Writes model, tokenizer and feature extractor to `folder`, each as transformers loads it; returns the folder."""
    torch.manual_seed(0)
    VoxtralForConditionalGeneration(_config()).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=MEL_BINS, processor_class="VoxtralProcessor").save_pretrained(folder)
    (folder / "tekken.json").write_text(json.dumps(_tokenizer()))
    return str(folder)


def _config() -> VoxtralConfig:
    text = {"model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
    # Four frames of the encoder make one audio token: 4 x 16 = 64. 30 s are 1500 frames, hence 375 tokens.
    audio = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return VoxtralConfig(
        audio_config={**audio, "num_mel_bins": MEL_BINS, "max_source_positions": 1500, "initializer_range": 0.2},
        text_config={**text, "vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2},
        audio_token_id=AUDIO_ID,
    )


def _tokenizer() -> dict:
    """Mistral's tokenizer file, of bytes and emotions."""
    spectrogram = {"num_mel_bins": MEL_BINS, "hop_length": 160, "window_size": 400}
    return {
        "config": {
            "pattern": r"[^\s]+|\s+",
            "num_vocab_tokens": len(PIECES),
            "default_vocab_size": VOCAB_SIZE,
            "default_num_special_tokens": len(SPECIAL_TOKENS),
            "version": "v7",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
            for rank, piece in enumerate(PIECES)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(SPECIAL_TOKENS)
        ],
        "audio": {
            "sampling_rate": 16_000,
            "frame_rate": 12.5,
            "chunk_length_s": 30.0,
            "audio_encoding_config": spectrogram,
        },
    }
