"""Nemotron-H, whose layers are Mamba, attention and MoE by turns, in the omni model and in Nemotron 3.5 Transcribe."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.hosts.tiny import AUDIO_TOKEN_ID, MEL_BINS, TinyHost, padded, text

SUBSAMPLING = 4


def _language_model(num_layers: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "nemotron_h",
        "layers_block_type": ["linear_attention", *["moe"] * (num_layers - 2), "full_attention"],
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 8,
        "n_routed_experts": 2,
        "num_experts_per_tok": 2,  # all of them: the choice of the best would depend on rounding
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        **text(num_layers),
        **more,
    }


def _nemotron_h_omni(num_layers: int) -> Any:
    return transformers.NemotronH_Omni_Reasoning_V3_Config(
        audio_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "conv_kernel_size": 3,
            "convolution_bias": False,
            "subsampling_factor": SUBSAMPLING,
            "subsampling_conv_channels": 8,
            "num_mel_bins": MEL_BINS,
            "projection_hidden_size": 32,
            "projection_bias": False,
            **dict.fromkeys(("dropout", "layerdrop", "activation_dropout", "attention_dropout"), 0.0),
        },
        vision_config={
            "model_type": "radio",
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 32,
            "max_img_size": 32,
            "video_temporal_patch_size": 2,
        },
        text_config=_language_model(num_layers),
        vision_hidden_size=8,
        projector_hidden_size=8,
        audio_token_id=AUDIO_TOKEN_ID,
        image_token_id=AUDIO_TOKEN_ID + 1,
        video_token_id=AUDIO_TOKEN_ID + 2,
    )


def _nemotron_h_omni_features(rows: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    # The extractor's mask leaves out the last frame of each clip; the model counts it again.
    features, mask = padded([row[:, :-1] for row in rows], max(row.shape[1] for row in rows), dtype)
    return {"input_features": features.transpose(1, 2).contiguous(), "input_features_mask": mask.bool()}


NEMOTRON_H_OMNI = TinyHost(
    "nemotron_h_omni",
    "NemotronH_Omni_Reasoning_V3",
    _nemotron_h_omni,
    _nemotron_h_omni_features,
    layers_path="language_model.model.layers",
    multimodal_path="",
    frames_per_token=SUBSAMPLING,
)


def _nemo_speechlm(num_layers: int) -> Any:
    transformer = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    listener = {**transformer, "num_mel_bins": MEL_BINS, "subsampling_factor": SUBSAMPLING}
    speakers = {"num_speakers": 2, "subsampling_factor": SUBSAMPLING}
    return transformers.Nemotron3_5TranscribeConfig(
        audio_config={
            "asr_config": listener,
            "diarization_config": {
                "model_type": "nemotron3_diarization",
                "audio_config": listener,
                "head_config": {"hidden_size": 8, "audio_hidden_size": 16, **speakers},
                "streaming_config": speakers,
            },
        },
        word_timestamp_config={**transformer, "vocab_size": 8, "blank_token_id": 7},
        # The tokenizer puts the placeholder after the language model's vocabulary, where there is no embedding.
        text_config=_language_model(num_layers, vocab_size=AUDIO_TOKEN_ID),
        audio_token_id=AUDIO_TOKEN_ID,
    )


def _nemo_speechlm_features(rows: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    features, mask = padded(rows, max(row.shape[1] for row in rows), dtype)
    return {"input_features": features.transpose(1, 2).contiguous(), "input_features_mask": mask}


NEMO_SPEECHLM = TinyHost(
    "nemo_speechlm",
    "Nemotron3_5TranscribeForConditionalGeneration",
    _nemo_speechlm,
    _nemo_speechlm_features,
    frames_per_token=SUBSAMPLING,
    decodes_placeholder=False,
)
