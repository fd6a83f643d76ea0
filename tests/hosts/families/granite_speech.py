"""Granite Speech and Granite Speech Plus: a conformer without a padding mask, a Q-Former over windows of its frames."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.hosts.tiny import AUDIO_TOKEN_ID, LEGACY_PATHS, MAX_CLIP_TOKENS, MEL_BINS, TinyHost, legacy, padded, text

FRAMES_PER_TOKEN = 4
ENCODER_WIDTH = 16


def _parts(num_layers: int, frame_width: int, **encoder: Any) -> dict[str, Any]:
    """Args: frame_width: how wide the encoder's frames are for the Q-Former."""
    return {
        "encoder_config": {
            "input_dim": MEL_BINS,
            "num_layers": 2,
            "hidden_dim": ENCODER_WIDTH,
            "feedforward_mult": 2,
            "num_heads": 2,
            "output_dim": 8,
            "context_size": 16,
            "max_pos_emb": 32,
            "dropout": 0.0,
            "conv_kernel_size": 3,
            **encoder,
        },
        "projector_config": {
            "model_type": "blip_2_qformer",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "encoder_hidden_size": frame_width,
            "cross_attention_frequency": 1,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        "text_config": {"model_type": "granite", **text(num_layers)},
        "audio_token_index": AUDIO_TOKEN_ID,
        "has_lora_adapter": False,
        "window_size": FRAMES_PER_TOKEN,
        "downsample_rate": FRAMES_PER_TOKEN,
    }


def _granite(num_layers: int) -> Any:
    return transformers.GraniteSpeechConfig(**_parts(num_layers, ENCODER_WIDTH))


def _granite_plus(num_layers: int) -> Any:
    # The Q-Former gets the frames of the first layer beside those of the last one.
    return transformers.GraniteSpeechPlusConfig(**_parts(num_layers, 2 * ENCODER_WIDTH, cat_hidden_layers=[1]))


def _granite_features(rows: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    # One length for all batches: the encoder has no padding mask, so a clip's features depend on how far
    # the batch is padded. The mask is over tokens, not frames.
    features, mask = padded(rows, FRAMES_PER_TOKEN * MAX_CLIP_TOKENS, dtype)
    return {
        "input_features": features.transpose(1, 2).contiguous(),
        "input_features_mask": mask[:, ::FRAMES_PER_TOKEN].bool(),
    }


GRANITE_SPEECH = TinyHost(
    "granite_speech",
    "GraniteSpeechForConditionalGeneration",
    _granite,
    _granite_features,
    cannot=frozenset({"checkpointing"}) | legacy("hidden_states", "several_clips", "clips_on_a_cache"),
    **LEGACY_PATHS,
)

GRANITE_SPEECH_PLUS = TinyHost(
    "granite_speech_plus",
    "GraniteSpeechPlusForConditionalGeneration",
    _granite_plus,
    _granite_features,
    cannot=frozenset({"checkpointing"}),
)
