"""Inkling: audio is a table of quantised mel bins, looked up like words; MoE, and short convolutions in each layer."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.hosts.tiny import AUDIO_TOKEN_ID, MEL_BINS, TinyHost, padded, text

MEL_LEVELS = 16  # what the processor quantises each mel bin to


def _inkling(num_layers: int) -> Any:
    return transformers.InklingConfig(
        audio_config={"n_mel_bins": MEL_BINS, "mel_vocab_size": MEL_LEVELS},
        vision_config={"patch_size": 2, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 1},
        text_config=text(
            num_layers,
            head_dim=8,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=2,
            swa_head_dim=8,
            sliding_window_size=16,
            local_layer_ids=[0],
            d_rel=4,
            rel_extent=16,
            moe_intermediate_size=16,
            n_routed_experts=3,
            num_experts_per_tok=3,  # all of them: the choice of the best would depend on rounding
            n_shared_experts=1,
            logits_mup_width_multiplier=1.0,
        ),
        audio_token_id=AUDIO_TOKEN_ID,
        image_token_id=AUDIO_TOKEN_ID + 1,
        audio_bos_token_id=AUDIO_TOKEN_ID - 1,
        image_bos_token_id=AUDIO_TOKEN_ID - 2,
    )


def _inkling_features(rows: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    features, mask = padded(rows, max(row.shape[1] for row in rows), dtype)
    levels = torch.linspace(-2, 2, MEL_LEVELS)
    nearest = (features.transpose(1, 2).float()[..., None] - levels).abs().argmin(-1)
    return {"audio_input_ids": nearest.int(), "audio_input_ids_mask": mask.bool()}


INKLING = TinyHost(
    "inkling_mm_model",
    "InklingForConditionalGeneration",
    _inkling,
    _inkling_features,
    feature_argument="audio_input_ids",
    frames_per_token=1,
    # 5.23: a full-attention layer takes the query's offset from the cache's own counter, which the update then moves.
    cannot=frozenset({"static_cache"}),
)
