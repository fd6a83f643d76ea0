"""Phi-4 multimodal: a flat config, and audio features that stay in the arguments at every decode step."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.hosts.tiny import AUDIO_TOKEN_ID, MAX_CLIP_TOKENS, MEL_BINS, TinyHost, legacy, padded, text


def _phi4(num_layers: int) -> Any:
    return transformers.Phi4MultimodalConfig(
        **text(num_layers),
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "input_size": MEL_BINS,
            "nemo_conv_channels": 8,
            "bias_max_distance": 32,
            "audio_token_id": AUDIO_TOKEN_ID,
        },
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 28,
            "crop_size": 28,
            "image_token_id": AUDIO_TOKEN_ID + 1,
            "feature_layer": -1,
        },
    )


def _phi4_features(rows: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    # One length for all batches: its encoder adds the padding mask (0 or 1) to the scores instead of masking (5.23), so
    # a clip's features depend on how far the batch is padded.
    features, mask = padded(rows, 8 * MAX_CLIP_TOKENS, dtype)
    return {
        "audio_input_features": features.transpose(1, 2).contiguous(),
        "audio_attention_mask": mask,
        "audio_embed_sizes": mask.sum(1) // 8,
    }


PHI4_MULTIMODAL = TinyHost(
    "phi4_multimodal",
    "Phi4MultimodalForCausalLM",
    _phi4,
    _phi4_features,
    feature_argument="audio_input_features",
    layers_path="model.layers",
    frames_per_token=8,
    decodes_placeholder=False,
    cannot=legacy("hidden_states"),
)
