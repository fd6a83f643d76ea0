"""Kyutai's speech to text: each id is a text token and the codes of an audio frame, (batch, seq_len, 1 + codebooks)."""

from typing import Any

import transformers

from tests.hosts.additive import BOS_ID, CODEBOOK_SIZE, AdditiveHost
from tests.hosts.tiny import VOCAB_SIZE, text

CODEBOOKS = 4


def _kyutai(num_layers: int) -> Any:
    common = text(num_layers, bos_token_id=BOS_ID)
    del common["intermediate_size"]
    return transformers.KyutaiSpeechToTextConfig(
        **common,
        head_dim=8,
        ffn_dim=64,
        sliding_window=64,
        num_codebooks=CODEBOOKS,
        codebook_vocab_size=CODEBOOK_SIZE + 1,
        audio_bos_token_id=CODEBOOK_SIZE,
        audio_pad_token_id=VOCAB_SIZE + CODEBOOKS * (CODEBOOK_SIZE + 1),
        codec_config={
            "model_type": "mimi",
            "sampling_rate": 128,
            "upsampling_ratios": [2, 2],  # 8 samples per frame
            "num_filters": 4,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "num_quantizers": CODEBOOKS,
            "codebook_size": CODEBOOK_SIZE,
            "codebook_dim": 8,
            "vector_quantization_hidden_dimension": 8,
            "upsample_groups": 16,
            "sliding_window": 64,
        },
    )


KYUTAI = AdditiveHost(
    "kyutai_speech_to_text",
    "KyutaiSpeechToTextForConditionalGeneration",
    _kyutai,
    lambda rows, dtype: {},  # the ids have everything
    feature_argument="input_ids",
    layers_path="model.layers",
    frames_per_token=1,
    codebooks=CODEBOOKS,
    codec="codec_model",
)
