"""GLM-ASR: four neighbouring encoder positions are joined to one token."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.hosts.tiny import AUDIO_TOKEN_ID, MAX_CLIP_TOKENS, MEL_BINS, TinyHost, padded, text


def _glmasr(num_layers: int) -> Any:
    return transformers.GlmAsrConfig(
        audio_config={
            "num_mel_bins": MEL_BINS,
            "hidden_size": 16,
            "intermediate_size": 64,  # also the width of four joined positions
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 4 * MAX_CLIP_TOKENS,
        },
        text_config={"model_type": "llama", **text(num_layers)},
        audio_token_id=AUDIO_TOKEN_ID,
    )


def _glmasr_features(rows: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    features, mask = padded(rows, 8 * MAX_CLIP_TOKENS, dtype)
    return {"input_features": features, "input_features_mask": mask}


GLMASR = TinyHost("glmasr", "GlmAsrForConditionalGeneration", _glmasr, _glmasr_features, frames_per_token=8)
