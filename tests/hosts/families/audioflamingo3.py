"""Audio Flamingo 3."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.hosts.tiny import AUDIO_TOKEN_ID, MAX_CLIP_TOKENS, TinyHost, encoder, padded, text


def _audio_flamingo(num_layers: int) -> Any:
    return transformers.AudioFlamingo3Config(
        audio_config=encoder(),
        text_config={"model_type": "qwen2", **text(num_layers)},
        audio_token_id=AUDIO_TOKEN_ID,
    )


def _audio_flamingo_features(rows: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    features, mask = padded(rows, 4 * MAX_CLIP_TOKENS, dtype)
    return {"input_features": features, "input_features_mask": mask}


AUDIO_FLAMINGO_3 = TinyHost(
    "audioflamingo3", "AudioFlamingo3ForConditionalGeneration", _audio_flamingo, _audio_flamingo_features
)
