"""Gemma 3n: parallel streams of hidden states between the layers (AltUp), and clips that all take as many tokens."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.hosts.tiny import AUDIO_TOKEN_ID, LAST_TEXT_ID, MEL_BINS, VOCAB_SIZE, TinyHost, legacy, padded, text

CLIP_TOKENS = 12
FRAMES_PER_TOKEN = 16
FIRST_VISION_ID, FIRST_AUDIO_ID = LAST_TEXT_ID + 1, AUDIO_TOKEN_ID - 4  # ids from here on have separate embeddings


def _gemma3n(num_layers: int, num_kv_shared_layers: int = 0) -> Any:
    config = transformers.Gemma3nConfig(
        audio_config={
            "vocab_offset": FIRST_AUDIO_ID,
            "vocab_size": VOCAB_SIZE - FIRST_AUDIO_ID,
            "input_feat_size": MEL_BINS,
            "hidden_size": 16,
            "conf_num_hidden_layers": 1,
            "conf_num_attention_heads": 2,
            "conf_attention_chunk_size": 4,
            "conf_attention_context_left": 5,
            "conf_conv_kernel_size": 3,
            "conf_reduction_factor": FRAMES_PER_TOKEN // 4,
            "sscp_conv_channel_size": (8, 4),
        },
        text_config=text(
            num_layers,
            head_dim=8,
            altup_num_inputs=3,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=FIRST_VISION_ID,
            laurel_rank=4,
            sliding_window=8,
            layer_types=["full_attention" if (num_layers - i) % 2 else "sliding_attention" for i in range(num_layers)],
            num_kv_shared_layers=num_kv_shared_layers,
        ),
        audio_soft_tokens_per_image=CLIP_TOKENS,
        audio_token_id=AUDIO_TOKEN_ID,
        boa_token_id=FIRST_AUDIO_ID,
        eoa_token_id=FIRST_AUDIO_ID + 1,
        image_token_id=FIRST_VISION_ID,
    )
    # The real vision tower needs timm, and the config takes no other: this one bypasses its type check.
    vars(config)["vision_config"] = transformers.SiglipVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=16,
        patch_size=8,
        rms_norm_eps=1e-6,
        vocab_offset=FIRST_VISION_ID,
        vocab_size=FIRST_AUDIO_ID - FIRST_VISION_ID,
    )
    return config


def _gemma3n_features(rows: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    # One length for all batches: the encoder's convolutions have no mask, so a clip's last token depends on how far the
    # batch is padded. It is below CLIP_TOKENS, so that the host pads the encoder's output too.
    features, mask = padded(rows, (CLIP_TOKENS - 2) * FRAMES_PER_TOKEN, dtype)
    return {"input_features": features.transpose(1, 2).contiguous(), "input_features_mask": mask.bool()}


GEMMA3N = TinyHost(
    "gemma3n",
    "Gemma3nForConditionalGeneration",
    _gemma3n,
    _gemma3n_features,
    frames_per_token=FRAMES_PER_TOKEN,
    clip_fills=CLIP_TOKENS,
    pads_clips=True,
    token_types="token_type_ids",
    stream_idx=0,
    # 4.57 drops the static cache of all layers where none shares its keys.
    cannot=legacy("static_cache", "clips_on_a_cache"),
)
