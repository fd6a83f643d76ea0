"""Voxtral: a clip is split into windows of a fixed length, one feature row each."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.hosts.tiny import AUDIO_TOKEN_ID, LEGACY_PATHS, MEL_BINS, TinyHost, legacy, text

VOXTRAL_WINDOW_TOKENS = 4


def _voxtral(num_layers: int) -> Any:
    # The encoder's frames are regrouped: 16 positions of width 16 are 4 tokens of width 64 (its feed-forward width).
    return transformers.VoxtralConfig(
        # 4.57 ignores the names of a Whisper encoder.
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_mel_bins": MEL_BINS,
            "max_source_positions": 4 * VOXTRAL_WINDOW_TOKENS,
        },
        text_config={"model_type": "llama", **text(num_layers, head_dim=8)},
        audio_token_id=AUDIO_TOKEN_ID,
    )


def _voxtral_features(rows: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {"input_features": torch.stack(list(rows)).to(dtype)}


VOXTRAL = TinyHost(
    "voxtral",
    "VoxtralForConditionalGeneration",
    _voxtral,
    _voxtral_features,
    window_tokens=VOXTRAL_WINDOW_TOKENS,
    frames_per_token=8,
    cannot=legacy("hidden_states", "clips_on_a_cache"),
    **LEGACY_PATHS,
)
