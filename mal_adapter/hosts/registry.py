"""The host families that detection alone gets wrong or leaves incomplete, one literal each."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Int
from torch import Tensor

from mal_adapter.hosts.remote_code import REMOTE
from mal_adapter.hosts.spec import HostSpec

__all__ = ["REGISTRY", "register_host"]


def gemma3n_clip_tokens(call: Mapping[str, Any]) -> Int[Tensor, " clips"] | None:
    """Gemma 3n: every clip takes 188 placeholders, 30 s. Sixteen frames of audio make a token; the rest is padding.

    Example:
        >>> import torch
        >>> gemma3n_clip_tokens({"input_features_mask": torch.arange(64) < torch.tensor([[64], [20]])})
        tensor([4, 2])
    """
    frames = call.get("input_features_mask")
    return None if frames is None else frames[:, ::16].sum(1)


REGISTRY: dict[str, HostSpec] = {
    **REMOTE,
    # AltUp: prediction and correction centre on stream 0.
    "gemma3n": HostSpec(stream_idx=0, merges_embeds=True, clip_tokens=gemma3n_clip_tokens),
    "inkling_mm_model": HostSpec(merges_embeds=True),
    "muse_spark": HostSpec(merges_embeds=True),
    "dots3_note": HostSpec(merges_embeds=True),
    "gemma4": HostSpec(merges_embeds=True),
    "gemma4_unified": HostSpec(merges_embeds=True),
    "qwen2_5_omni_thinker": HostSpec(merges_embeds=True),
    "qwen3_omni_moe_thinker": HostSpec(merges_embeds=True),
    "voxtral_realtime": HostSpec(
        audio_positions="every", feature_arguments=("input_features", "encoder_inputs_embeds")
    ),
    # Its prompts are (batch, seq_len, 1 + codebooks): a text id and the audio's codes at each position.
    "kyutai_speech_to_text": HostSpec(audio_positions="every", feature_arguments=("input_ids", "inputs_embeds")),
}


def register_host(model_type: str, spec: HostSpec) -> None:
    """Describe hosts of `config.model_type` where detection fails; a user's own `HostSpec` has priority.

    Example:
        >>> register_host("my_remote_code_model", HostSpec(layers="llm.model.layers", audio_token_id=7))
    """
    REGISTRY[model_type] = spec
