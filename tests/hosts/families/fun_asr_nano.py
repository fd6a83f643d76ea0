"""Fun-ASR-Nano: a token per low-rate frame, which is several mel frames stacked."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.hosts.tiny import AUDIO_TOKEN_ID, MEL_BINS, WIDTH, TinyHost, padded, text

STACKED_FRAMES = 4


def _fun_asr_nano(num_layers: int) -> Any:
    config = transformers.FunAsrNanoConfig(
        audio_config={
            "num_mel_bins": MEL_BINS,
            "num_stacked_frames": STACKED_FRAMES,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_timestamp_prediction_layers": 1,
            "fsmn_kernel_size": 3,
            "max_position_embeddings": 64,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        adaptor_config={
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH // 4,
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
            "projector_hidden_size": 32,
        },
        text_config={"model_type": "qwen3", **text(num_layers, head_dim=8)},
        audio_token_id=AUDIO_TOKEN_ID,
    )
    # As from_pretrained(attn_implementation="sdpa"): otherwise the adaptor has no mask and attends to padding.
    config._attn_implementation = "sdpa"
    return config


def _fun_asr_nano_features(rows: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    features, mask = padded(rows, max(row.shape[1] for row in rows), dtype)
    stacked = features.transpose(1, 2).reshape(len(rows), -1, STACKED_FRAMES * MEL_BINS)
    return {"input_features": stacked, "input_features_mask": mask[:, ::STACKED_FRAMES].contiguous()}


FUN_ASR_NANO = TinyHost(
    "fun_asr_nano",
    "FunAsrNanoForConditionalGeneration",
    _fun_asr_nano,
    _fun_asr_nano_features,
    frames_per_token=STACKED_FRAMES,
)
