"""VibeVoice-ASR: two convolutional encoders over the waveform, run chunk by chunk."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.hosts.tiny import AUDIO_TOKEN_ID, MEL_BINS, TinyHost, padded, text

VIBEVOICE_HOP_LENGTH = 16
CHUNK_TOKENS = 4


def _vibevoice_asr(num_layers: int) -> Any:
    tokenizer_encoder = {
        "model_type": "vibevoice_acoustic_tokenizer_encoder",
        "kernel_size": 3,
        "num_filters": 4,
        "downsampling_ratios": [4, 4],
        "depths": [1, 1, 1],
        "ffn_expansion": 2,
        "layer_scale_init_value": 0.5,
        # The noise of σ-VAE sampling is drawn again at each call; at this scale it is zero.
        "vae_std": 0.0,
    }
    return transformers.VibeVoiceAsrConfig(
        acoustic_tokenizer_encoder_config={**tokenizer_encoder, "hidden_size": 8},
        semantic_tokenizer_encoder_config={**tokenizer_encoder, "hidden_size": 12},
        text_config={"model_type": "qwen2", **text(num_layers)},
        audio_token_id=AUDIO_TOKEN_ID,
        audio_bos_token_id=AUDIO_TOKEN_ID - 2,
        audio_eos_token_id=AUDIO_TOKEN_ID - 1,
        acoustic_tokenizer_chunk_size=CHUNK_TOKENS * VIBEVOICE_HOP_LENGTH,
    )


def _vibevoice_features(rows: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A row's (mel_bins, frames) are read as mel_bins · frames samples of a waveform."""
    features, mask = padded(rows, max(row.shape[1] for row in rows), dtype)
    return {
        "input_values": features.transpose(1, 2).reshape(len(rows), 1, -1),
        "padding_mask": mask.repeat_interleave(MEL_BINS, dim=1),
    }


VIBEVOICE_ASR = TinyHost(
    "vibevoice_asr",
    "VibeVoiceAsrForConditionalGeneration",
    _vibevoice_asr,
    _vibevoice_features,
    feature_argument="input_values",
    frames_per_token=VIBEVOICE_HOP_LENGTH // MEL_BINS,
)
