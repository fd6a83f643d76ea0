"""MOSS-Transcribe-Diarize: feature rows are windows of a clip, and time markers are between its audio tokens."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.hosts.tiny import AUDIO_TOKEN_ID, TinyHost, encoder, padded, text

MERGED_POSITIONS = 2
WINDOW_TOKENS = 8
FRAMES_PER_TOKEN = 2 * MERGED_POSITIONS
HOP_LENGTH = 2


def _moss(num_layers: int) -> Any:
    return transformers.MossTranscribeDiarizeConfig(
        audio_config=encoder(max_source_positions=WINDOW_TOKENS * MERGED_POSITIONS),
        text_config={"model_type": "qwen3", **text(num_layers, head_dim=8)},
        audio_token_id=AUDIO_TOKEN_ID,
        audio_merge_size=MERGED_POSITIONS,
        audio_chunk_size=WINDOW_TOKENS * FRAMES_PER_TOKEN * HOP_LENGTH,
    )


def _moss_features(rows: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A clip longer than a window is split; each window, the last one padded, is a row of the features."""
    frames = WINDOW_TOKENS * FRAMES_PER_TOKEN
    features, mask = padded([window for row in rows for window in row.split(frames, dim=1)], frames, dtype)
    _, samples = padded([row.repeat_interleave(HOP_LENGTH, dim=1) for row in rows], HOP_LENGTH * _longest(rows), dtype)
    return {"input_features": features, "input_features_mask": mask, "padding_mask": samples}


def _longest(rows: Sequence[Tensor]) -> int:
    return max(row.shape[1] for row in rows)


MOSS_TRANSCRIBE_DIARIZE = TinyHost(
    "moss_transcribe_diarize",
    "MossTranscribeDiarizeForConditionalGeneration",
    _moss,
    _moss_features,
    frames_per_token=FRAMES_PER_TOKEN,
    time_marker_every=3,
)
