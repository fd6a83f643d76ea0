"""Gemma 4 unified: no audio encoder, frames of raw samples are projected into the embeddings."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.hosts.tiny import AUDIO_TOKEN_ID, MEL_BINS, TinyHost, padded, text


def _gemma4_unified(num_layers: int, num_kv_shared_layers: int = 0) -> Any:
    return transformers.Gemma4UnifiedConfig(
        audio_config={"audio_embed_dim": MEL_BINS},
        text_config=text(
            num_layers,
            head_dim=8,
            global_head_dim=16,
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
            sliding_window=8,
            layer_types=["full_attention" if (num_layers - i) % 2 else "sliding_attention" for i in range(num_layers)],
            final_logit_softcapping=30.0,
            num_kv_shared_layers=num_kv_shared_layers,
        ),
        vision_config=None,
        audio_token_id=AUDIO_TOKEN_ID,
        image_token_id=AUDIO_TOKEN_ID + 1,
        video_token_id=AUDIO_TOKEN_ID + 2,
        boa_token_id=AUDIO_TOKEN_ID - 2,
        eoa_token_index=AUDIO_TOKEN_ID - 1,
    )


def _gemma4_unified_features(rows: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    features, mask = padded(rows, max(row.shape[1] for row in rows), dtype)
    return {"input_features": features.transpose(1, 2).contiguous(), "input_features_mask": mask.bool()}


GEMMA4_UNIFIED = TinyHost(
    "gemma4_unified",
    "Gemma4UnifiedForConditionalGeneration",
    _gemma4_unified,
    _gemma4_unified_features,
    frames_per_token=1,
    token_types="mm_token_type_ids",
)
