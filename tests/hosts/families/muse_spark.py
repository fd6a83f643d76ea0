"""Muse Spark: a causal convolutional encoder of the waveform itself; MoE; layers without positions."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.hosts.tiny import AUDIO_TOKEN_ID, MEL_BINS, WIDTH, TinyHost, text


def _muse(num_layers: int) -> Any:
    return transformers.MuseSparkConfig(
        audio_config={
            "patch_sizes": [4, MEL_BINS // 4],
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "num_hidden_layers": 2,
            "mlp_ratio": 2.0,
            "conv_kernel_size": 3,
            "out_hidden_size": WIDTH,
        },
        vision_config={
            "patch_size": 2,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
            "num_attention_heads": 1,
            "num_hidden_layers": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "max_position_embeddings": 16,
        },
        text_config=text(
            num_layers,
            head_dim=8,
            sliding_window=16,
            output_multiplier=1.0,
            moe_hidden_size=16,
            moe_intermediate_size=16,
            num_local_experts=3,
            num_experts_per_tok=3,  # all of them: the choice of the best would depend on rounding
        ),
        out_hidden_size=32,
        projector_hidden_size=8,
        audio_token_id=AUDIO_TOKEN_ID,
        image_token_id=AUDIO_TOKEN_ID + 1,
        video_token_id=AUDIO_TOKEN_ID + 2,
    )


def _muse_features(rows: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    clips = [row.T.flatten() for row in rows]  # MEL_BINS samples per token
    values = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    lengths = torch.tensor([len(clip) for clip in clips])
    mask = torch.arange(values.shape[1]) < lengths[:, None]
    return {"input_values": values.to(dtype), "input_values_mask": mask.int()}


MUSE_SPARK = TinyHost(
    "muse_spark",
    "MuseSparkForConditionalGeneration",
    _muse,
    _muse_features,
    feature_argument="input_values",
    frames_per_token=1,
)
