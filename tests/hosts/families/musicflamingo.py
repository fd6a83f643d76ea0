"""Music Flamingo: Audio Flamingo 3 with rotary time embeddings, whose clips are the runs of placeholder ids."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.hosts.tiny import AUDIO_TOKEN_ID, MAX_CLIP_TOKENS, TinyHost, encoder, padded, text


def _music_flamingo(num_layers: int) -> Any:
    return transformers.MusicFlamingoConfig(
        audio_config={"model_type": "audioflamingo3_encoder", **encoder()},
        text_config={"model_type": "qwen2", **text(num_layers)},
        audio_token_id=AUDIO_TOKEN_ID,
        audio_bos_token_id=AUDIO_TOKEN_ID - 2,
        audio_eos_token_id=AUDIO_TOKEN_ID - 1,
    )


def _music_flamingo_features(rows: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    features, mask = padded(rows, 4 * MAX_CLIP_TOKENS, dtype)
    return {"input_features": features, "input_features_mask": mask}


MUSIC_FLAMINGO = TinyHost(
    "musicflamingo", "MusicFlamingoForConditionalGeneration", _music_flamingo, _music_flamingo_features
)
