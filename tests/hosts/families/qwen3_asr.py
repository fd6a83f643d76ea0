"""Qwen3-ASR: the encoder convolves chunks of 100 mel frames, which become 13 tokens each."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.hosts.tiny import AUDIO_TOKEN_ID, MEL_BINS, PAD_ID, WIDTH, TinyHost, padded, text

CHUNK_FRAMES = 100  # 2 * n_window; its 13 tokens are a literal in transformers, so no smaller chunk works


def _qwen3_asr(num_layers: int) -> Any:
    return transformers.Qwen3ASRConfig(
        audio_config={
            "num_mel_bins": MEL_BINS,
            "d_model": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "downsample_hidden_size": 4,
            "output_dim": WIDTH,
        },
        text_config={"model_type": "qwen3", **text(num_layers, head_dim=8)},
        audio_token_id=AUDIO_TOKEN_ID,
        pad_token_id=PAD_ID,
    )


def _qwen3_asr_features(rows: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    # The extractor pads to whole chunks. Within one, a token is 8 frames: clips of up to 12 tokens.
    features, mask = padded(rows, CHUNK_FRAMES, dtype)
    return {"input_features": features, "input_features_mask": mask}


QWEN3_ASR = TinyHost(
    "qwen3_asr", "Qwen3ASRForConditionalGeneration", _qwen3_asr, _qwen3_asr_features, frames_per_token=8
)
