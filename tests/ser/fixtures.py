"""A tiny random Qwen2-Audio with its real processor, and sound files of all kinds."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    WhisperFeatureExtractor,
)

from mal_adapter.ser.dialogue import Dialogue, Utterance

AUDIO, EOS = "<|AUDIO|>", "<|im_end|>"
CHUNK_S = 4


@pytest.fixture(scope="session")
def processor():
    """A byte-level tokenizer with a few merges: 'sad' is one token, 'sadness' two, most words one per letter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("s", "a"), ("sa", "d"), ("n", "e"), ("ne", "s"), ("nes", "s"), ("h", "a"), ("ha", "p"), (":", "a")]
    tokens = alphabet + ["".join(pair) for pair in merges]
    bpe = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    # No splitting at word boundaries, so that merges across them happen, as in SentencePiece models.
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", AUDIO, "<|audio_bos|>", "<|audio_eos|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, pad_token="<|pad|>", additional_special_tokens=special
    )
    return Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=16, chunk_length=CHUNK_S), tokenizer)


@pytest.fixture(scope="session")
def model(processor):
    torch.manual_seed(0)
    vocabulary = len(processor.tokenizer)
    config = Qwen2AudioConfig(
        audio_config=Qwen2AudioEncoderConfig(
            num_mel_bins=16, d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32,
            max_source_positions=CHUNK_S * 50, initializer_range=0.3,
        ),
        text_config=Qwen2Config(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.3,
        ),
        audio_token_index=processor.tokenizer.convert_tokens_to_ids(AUDIO),
    )  # fmt: skip
    model = Qwen2AudioForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return model


def tone(duration_s=1.0, sampling_rate=16_000, pitch_hz=220.0, channels=1):
    """(samples,) or (samples, channels): a tone with a little noise."""
    time_s = np.arange(int(duration_s * sampling_rate)) / sampling_rate
    noise = np.random.default_rng(int(pitch_hz)).normal(0, 0.01, time_s.size)
    wave = (0.3 * np.sin(2 * np.pi * pitch_hz * time_s) + noise).astype(np.float32)
    return wave if channels == 1 else np.stack([wave, *[0.5 * wave] * (channels - 1)], axis=1)


@pytest.fixture
def write_audio(tmp_path):
    """write(name, duration_s=…, sampling_rate=…, …) -> path of a sound file; the format is that of the name."""

    def write(name, duration_s=1.0, sampling_rate=16_000, pitch_hz=220.0, channels=1, **options) -> Path:
        path = tmp_path / name
        soundfile.write(path, tone(duration_s, sampling_rate, pitch_hz, channels), sampling_rate, **options)
        return path

    return write


@pytest.fixture
def make_dialogue(write_audio):
    """make("id", [seconds, …]) -> a Dialogue of tones of different pitch."""

    def make(dialogue_id, durations_s=(0.7, 1.3, 1.0)) -> Dialogue:
        seed = sum(map(ord, dialogue_id))
        return Dialogue(
            dialogue_id,
            tuple(
                Utterance(
                    dialogue_id,
                    str(n),
                    "AB"[n % 2],
                    write_audio(f"{dialogue_id}-{n}.wav", duration_s, pitch_hz=100 + (37 * (seed + 3 * n)) % 300),
                )
                for n, duration_s in enumerate(durations_s)
            ),
        )

    return make
