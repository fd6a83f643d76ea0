"""Voxtral Realtime: 8 frames of audio are added to each token, in decode steps as in the prompt."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.hosts.additive import AdditiveHost
from tests.hosts.tiny import MEL_BINS, text


def _voxtral_realtime(num_layers: int) -> Any:
    return transformers.VoxtralRealtimeConfig(
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 8,
            "num_mel_bins": MEL_BINS,
            "sliding_window": 64,
        },
        text_config=text(num_layers, head_dim=8, sliding_window=64),
    )


def _voxtral_realtime_features(rows: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {"input_features": torch.stack(list(rows)).to(dtype), "num_delay_tokens": torch.tensor(2)}


VOXTRAL_REALTIME = AdditiveHost(
    "voxtral_realtime",
    "VoxtralRealtimeForConditionalGeneration",
    _voxtral_realtime,
    _voxtral_realtime_features,
    frames_per_token=8,
    prefill=3,
    pads_left=False,  # its encoder has no mask
    cannot=frozenset({"input_grads"}),  # it adds audio into the embeddings in place
)
