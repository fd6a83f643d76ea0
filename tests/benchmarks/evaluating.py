"""The six arms of an evaluation, each with the whole host and all from one pass of its encoder and lower layers."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    WhisperFeatureExtractor,
)

from mal_adapter import attach_memory
from mal_adapter.demo import EMOTIONS, HOST_FOLDER, PROMPT
from mal_adapter.demo.dialogues import make_dialogue, write_wavs
from mal_adapter.ser.evaluation import AUDIT
from mal_adapter.ser.evaluation.activations import SharedActivations
from mal_adapter.ser.evaluation.audit import Answers, audit
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
from tests.benchmarks.rows import Row
from tests.benchmarks.timing import interleaved

DIALOGUES, TURNS, BATCH = 2, 3, 2


def evaluation_time(device: str, seconds: float) -> Iterator[Row]:
    """The time of the six arms on an encoder as large as Whisper base's, whose window is 30 s for every utterance."""
    recognizer = _whisper_base(device)
    with tempfile.TemporaryDirectory() as folder:
        dialogues = write_wavs([make_dialogue("test", 7, n, TURNS) for n in range(DIALOGUES)], Path(folder, "wavs"))

        def whole() -> Answers:
            return audit(recognizer, dialogues, AUDIT, batch_size=BATCH, history=1, seed=0)[0]

        def once() -> Answers:
            shared = SharedActivations(recognizer, Path(folder, "activations"), batch_size=BATCH, keep=False)
            with shared.of(dialogues) as fast:
                return audit(fast, dialogues, AUDIT, batch_size=BATCH, history=1, seed=0)[0]

        furthest = _furthest(whole(), once())
        ours, theirs = interleaved(once, whole, seconds=seconds, device=device, least=3, warm=True)
    size = f"{DIALOGUES} dialogues of {TURNS} turns, six arms, encoder of Whisper base's size"
    measure = "evaluation with the whole host in each arm / from activations of one pass"
    yield Row(measure, size, theirs.median / ours.median, "≥", 4.0, (ours, theirs))
    yield Row("largest difference of their probabilities", size, furthest, "≤", 1e-5)


def _whisper_base(device: str) -> EmotionRecognizer:
    """The demo's processor and a decoder of 4 layers behind a random encoder of 6 layers, 512 wide, of 3000 frames."""
    _, processor = load_host(str(HOST_FOLDER))
    processor.feature_extractor = WhisperFeatureExtractor(feature_size=80, return_attention_mask=True)
    text = Qwen2AudioConfig.from_pretrained(HOST_FOLDER).text_config
    audio = Qwen2AudioEncoderConfig(
        num_mel_bins=80,
        d_model=512,
        encoder_layers=6,
        encoder_attention_heads=8,
        encoder_ffn_dim=2048,
        max_source_positions=1500,
    )
    index = processor.tokenizer.convert_tokens_to_ids(processor.audio_token)
    torch.manual_seed(0)
    config = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=index)
    model = Qwen2AudioForConditionalGeneration(config).eval()
    memory = attach_memory(model.to(device), 1)
    for parameter in memory.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return EmotionRecognizer(model, processor, memory, EMOTIONS, PROMPT)


def _furthest(first: Answers, second: Answers) -> float:
    """The largest difference of two probabilities."""
    return max(
        abs(first[arm][key].probabilities[label] - second[arm][key].probabilities[label])
        for arm in first
        for key in first[arm]
        for label in EMOTIONS
    )
