"""Qwen2.5-Omni: the thinker processes audio; M-RoPE positions."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.hosts.tiny import AUDIO_TOKEN_ID, LEGACY, MAX_CLIP_TOKENS, WIDTH, TinyHost, encoder, legacy, padded, text

# In 4.57 the thinker merges audio itself, and the model inside is the language model.
THINKER_PATHS = {"layers_path": "model.layers", "multimodal_path": ""} if LEGACY else {}


def _qwen_omni_thinker(num_layers: int) -> Any:
    return transformers.Qwen2_5OmniThinkerConfig(
        audio_config=encoder(n_window=8, output_dim=WIDTH),
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 1,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [0],
        },
        text_config=text(
            num_layers,
            rope_scaling={"rope_type": "default", "mrope_section": [2, 1, 1]},  # called rope_parameters since 5.0
            tie_word_embeddings=False,
        ),
        audio_token_index=AUDIO_TOKEN_ID,
        image_token_index=AUDIO_TOKEN_ID + 1,
        video_token_index=AUDIO_TOKEN_ID + 2,
        audio_start_token_id=AUDIO_TOKEN_ID - 2,
        audio_end_token_id=AUDIO_TOKEN_ID - 1,
        vision_start_token_id=AUDIO_TOKEN_ID - 3,  # a checkpoint's config has it, the class in 5.23 has no default
    )


def _qwen_features(rows: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    features, mask = padded(rows, 4 * MAX_CLIP_TOKENS, dtype)
    return {"input_features": features, "feature_attention_mask": mask}


QWEN2_5_OMNI_THINKER = TinyHost(
    "qwen2_5_omni_thinker",
    "Qwen2_5OmniThinkerForConditionalGeneration",
    _qwen_omni_thinker,
    _qwen_features,
    cannot=legacy("static_cache", "clips_on_a_cache"),
    **THINKER_PATHS,
)
