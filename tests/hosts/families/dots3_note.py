"""Dots 3 Note: latent attention that indexes its keys, MoE, clips in chunks, which generate() repeats per prompt."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.hosts.tiny import AUDIO_TOKEN_ID, MEL_BINS, WIDTH, TinyHost, padded, text


def _dots3_note(num_layers: int) -> Any:
    return transformers.Dots3NoteConfig(
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "feature_size": MEL_BINS,
            "hop_length": 1,
            "downsample_hidden_size": 8,
            "adapter_input_size": 16,
            "adapter_out_dim": WIDTH,
        },
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "mlp_layer_types": ["dense"],
            "adapter_in_dim": 8,
            "adapter_out_dim": WIDTH,
        },
        text_config=text(
            num_layers,
            num_key_value_heads=4,
            head_dim=12,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
            q_lora_rank=16,
            kv_lora_rank=16,
            index_head_dim=8,
            index_n_heads=2,
            index_topk=64,  # more than any prompt's keys: the choice of the best would depend on rounding
            sliding_window=16,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=4,
            swa_head_dim=12,
            swa_qk_nope_head_dim=8,
            swa_v_head_dim=8,
            swa_q_lora_rank=16,
            swa_kv_lora_rank=16,
            moe_intermediate_size=16,
            n_routed_experts=3,
            num_experts_per_tok=3,  # all of them, for the same reason
            shared_experts_intermediate_size=16,
        ),
        audio_token_id=AUDIO_TOKEN_ID,
        image_token_id=AUDIO_TOKEN_ID + 1,
        video_token_id=AUDIO_TOKEN_ID + 2,
    )


def _dots3_note_features(rows: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    features, mask = padded(rows, max(row.shape[1] for row in rows), dtype)
    return {"input_features": features, "chunk_sample_lengths": mask.sum(1)}


DOTS3_NOTE = TinyHost(
    "dots3_note",
    "Dots3NoteForConditionalGeneration",
    _dots3_note,
    _dots3_note_features,
    frames_per_token=8,
    keeps_clips_together=True,
)
