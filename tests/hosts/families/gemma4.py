"""Gemma 4: per-layer inputs beside the embeddings, sliding and full attention in turn, a chunked conformer."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests.hosts.tiny import AUDIO_TOKEN_ID, MAX_CLIP_TOKENS, MEL_BINS, PAD_ID, VOCAB_SIZE, TinyHost, padded, text


def _gemma4(num_layers: int, num_kv_shared_layers: int = 0) -> Any:
    return transformers.Gemma4Config(
        audio_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "subsampling_conv_channels": [MEL_BINS, 4],
            "conv_kernel_size": 3,
            "attention_chunk_size": 4,
            "attention_context_left": 5,
            "output_proj_dims": 16,
        },
        text_config=text(
            num_layers,
            head_dim=8,
            global_head_dim=16,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCAB_SIZE,
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


def _gemma4_features(rows: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    features, mask = padded(rows, 4 * MAX_CLIP_TOKENS, dtype)
    return {"input_features": features.transpose(1, 2).contiguous(), "input_features_mask": mask.bool()}


def _per_layer_inputs(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Without them the host looks for the id of each embedding, and finds none for the placeholder."""
    ids = ids.masked_fill(ids == AUDIO_TOKEN_ID, PAD_ID)
    return {"per_layer_inputs": model.model.language_model.get_per_layer_inputs(ids)}


GEMMA4 = TinyHost(
    "gemma4",
    "Gemma4ForConditionalGeneration",
    _gemma4,
    _gemma4_features,
    token_types="mm_token_type_ids",
    beside_embeddings=_per_layer_inputs,
    float32_modules=("model.audio_tower", "model.embed_audio"),
)
