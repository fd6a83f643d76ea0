"""Qwen2-Audio: Whisper encoder, one clip per feature row of a fixed length."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.hosts.tiny import AUDIO_TOKEN_ID, LEGACY_PATHS, MAX_CLIP_TOKENS, TinyHost, encoder, legacy, padded, text


def _qwen2_audio(num_layers: int) -> Any:
    return transformers.Qwen2AudioConfig(
        audio_config=encoder(),
        text_config={"model_type": "qwen2", **text(num_layers)},
        audio_token_index=AUDIO_TOKEN_ID,
    )


def _qwen_features(rows: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    features, mask = padded(rows, 4 * MAX_CLIP_TOKENS, dtype)
    return {"input_features": features, "feature_attention_mask": mask}


QWEN2_AUDIO = TinyHost(
    "qwen2_audio",
    "Qwen2AudioForConditionalGeneration",
    _qwen2_audio,
    _qwen_features,
    cannot=legacy("hidden_states", "clips_on_a_cache"),
    **LEGACY_PATHS,
)
