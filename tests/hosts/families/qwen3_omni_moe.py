"""Qwen3-Omni: the thinker processes audio; M-RoPE positions, and a mixture of experts in every layer."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.hosts.families.qwen2_5_omni import THINKER_PATHS
from tests.hosts.tiny import AUDIO_TOKEN_ID, WIDTH, TinyHost, encoder, legacy, padded, text

CHUNK_FRAMES = 100  # 2 * n_window; its 13 tokens are a literal in transformers, so no smaller chunk works


def _qwen3_omni_thinker(num_layers: int) -> Any:
    return transformers.Qwen3OmniMoeThinkerConfig(
        audio_config=encoder(downsample_hidden_size=4, output_dim=WIDTH),
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 1,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 4,
            "deepstack_visual_indexes": [0],
        },
        text_config=text(
            num_layers,
            rope_scaling={"rope_type": "default", "mrope_section": [2, 1, 1]},  # called rope_parameters since 5.0
            moe_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=4,  # a choice among experts would turn a rounding error into another output
        ),
        audio_token_id=AUDIO_TOKEN_ID,
        image_token_id=AUDIO_TOKEN_ID + 1,
        video_token_id=AUDIO_TOKEN_ID + 2,
        audio_start_token_id=AUDIO_TOKEN_ID - 2,
        vision_start_token_id=AUDIO_TOKEN_ID - 3,  # a checkpoint's config has it, the class in 5.23 has no default
    )


def _qwen_features(rows: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    # Within a chunk a token is 8 frames: clips of up to 12 tokens.
    features, mask = padded(rows, CHUNK_FRAMES, dtype)
    return {"input_features": features, "feature_attention_mask": mask}


QWEN3_OMNI_MOE_THINKER = TinyHost(
    "qwen3_omni_moe_thinker",
    "Qwen3OmniMoeThinkerForConditionalGeneration",
    _qwen3_omni_thinker,
    _qwen_features,
    frames_per_token=8,
    # Before transformers 5 all clips of a batch attended to each other in its encoder, except with flash attention.
    cannot=legacy("static_cache", "clips_on_a_cache", "hidden_states", "batches"),
    **THINKER_PATHS,
)
