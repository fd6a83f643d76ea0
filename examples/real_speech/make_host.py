"""A small but genuine Qwen2-Audio with Whisper's encoder, trained on single clips of some speakers.

    mal-adapter simulate ravdess=clips/RAVDESS emodb=clips/EmoDB --host-share 0.25 … --output dialogues
    python examples/real_speech/make_host.py host --whisper openai/whisper-base --clips dialogues/host.jsonl

The encoder stays as it is, so each clip goes through it once. What is trained is the projector and a decoder with
random first weights, by three questions about each clip: the emotion, how high the voice is and how loud, since a host
that learns emotion alone forgets the voice. The folder `host` loads like any other model's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor, WhisperFeatureExtractor
from transformers.models.qwen2_audio.configuration_qwen2_audio import Qwen2AudioEncoderConfig
from whisper_encoder import Encoder, load_encoder

sys.path.append(str(Path(__file__).parents[1] / "controlled_benchmark"))
from tiny_host import build_model, build_processor, prompt_text, save_host, tower_output

from mal_adapter.ser.corpora import read_manifests
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.recognizer.audio import load_waveform

RATE = 16_000
QUESTIONS = {
    "emotion": "How does the speaker feel?",
    "pitch": "How high is the voice?",
    "loudness": "How loud is the voice?",
}
#: Answers about the voice are "0" … "31" on these scales, of Hz (logarithmic) and of dB below full scale.
STEPS, PITCH_HZ, LOUDNESS_DB = 32, (70.0, 450.0), (-55.0, -10.0)

_Item = TypeVar("_Item")

__all__ = ["Clip", "build_host", "train_host", "voice_of"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the model and its processor")
    parser.add_argument("--whisper", required=True, help="folder or Hub id of a Whisper, or a folder of CTranslate2")
    parser.add_argument(
        "--clips", type=Path, required=True, help="manifest: clips with emotions, of the host's speakers"
    )
    parser.add_argument(
        "--layers", type=int, default=4, help="of Whisper's encoder; the last ones know words, not voices"
    )
    parser.add_argument("--seconds", type=int, default=4, help="the longest audio that the host takes")
    parser.add_argument("--width", type=int, default=128, help="of the decoder")
    parser.add_argument("--decoder-layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=250, help="many more learn the clips by heart")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--encoded", type=Path, help="file of the encoded clips, for other seeds (default: beside output)"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    corpus = read_manifests(options.clips)
    utterances = [turn for (split,) in [corpus.splits.values()] for one in split for turn in one.utterances]
    model, processor = build_host(
        load_encoder(options.whisper),
        corpus.labels.names,
        layers=options.layers,
        seconds=options.seconds,
        width=options.width,
        decoder_layers=options.decoder_layers,
        seed=options.seed,
    )
    cache = options.encoded or options.output.with_name(options.output.name + "-encoded.safetensors")
    clips = encode_once(model, processor, utterances, cache, [options.whisper, options.layers, options.seconds])
    train, dev = by_speaker(clips, options.seed)
    accuracy = train_host(model, processor, train, dev, steps=options.steps, seed=options.seed)
    # `mal-adapter train` warns where a memory's dialogues have speakers that its host knows
    model.config.training_speakers = sorted({clip.speaker for clip in clips})
    save_host(model, processor, options.output)
    heldout = len({clip.speaker for clip in dev})
    print(f"saved in {options.output}; accuracy on {heldout} dev speakers: {accuracy:.3f}")


@dataclass(frozen=True)
class Clip:
    """One clip, encoded.

    Attributes:
        audio: what the audio tower gives, float16, (audio tokens, tower width).
        answers: task -> the right answer, one word.
    """

    speaker: str
    audio: Tensor
    answers: dict[str, str]


def build_host(
    encoder: Encoder, emotions: Sequence[str], *, layers: int, seconds: int, width: int, decoder_layers: int, seed: int
) -> tuple[Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor]:
    """A host whose audio tower is the first layers of Whisper's encoder, with its final norm.

    The tower takes `seconds` of audio instead of Whisper's 30. Frames and positions up to there are the same.
    """
    texts = [*QUESTIONS.values(), *emotions, *(f" {name}" for name in emotions), *map(str, range(STEPS))]
    extractor = WhisperFeatureExtractor(feature_size=encoder.mel_bins, chunk_length=seconds, return_attention_mask=True)
    processor = build_processor(extractor, [*texts, "user", "assistant", "system"])
    positions = 50 * seconds
    audio = Qwen2AudioEncoderConfig(
        num_mel_bins=encoder.mel_bins,
        d_model=encoder.width,
        encoder_layers=layers,
        encoder_attention_heads=encoder.heads,
        encoder_ffn_dim=encoder.weights["layers.0.fc1.weight"].shape[0],
        max_source_positions=positions,
    )
    model = build_model(processor.tokenizer, seed, width, decoder_layers, audio, dropout=0.2)
    kept = {name: weight for name, weight in encoder.weights.items() if not _is_above(name, layers)}
    kept["embed_positions.weight"] = kept["embed_positions.weight"][:positions]
    model.model.audio_tower.load_state_dict(kept)
    model.model.audio_tower.requires_grad_(False)
    return model, processor


def _is_above(name: str, layers: int) -> bool:
    parts = name.split(".")
    return parts[0] == "layers" and int(parts[1]) >= layers


def encode_once(
    model: Qwen2AudioForConditionalGeneration,
    processor: Qwen2AudioProcessor,
    utterances: Sequence[Utterance],
    cache: Path,
    encoder: Sequence[object],
) -> list[Clip]:
    """The clips from the cache if it has these utterances by this encoder; else encoded, and kept there."""
    said = [[str(u.audio), u.start_s, u.end_s, u.speaker, u.emotion] for u in utterances]
    key = hashlib.sha256(json.dumps([list(encoder), said]).encode()).hexdigest()
    if cache.exists():
        with safe_open(cache, "pt") as file:
            metadata = file.metadata()
            if metadata["key"] == key:
                answers = json.loads(metadata["answers"])
                return [Clip(u.speaker, file.get_tensor(str(n)), answers[n]) for n, u in enumerate(utterances)]
    clips = encode(model, processor, utterances)
    tensors = {str(n): clip.audio.contiguous() for n, clip in enumerate(clips)}
    cache.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, cache, {"key": key, "answers": json.dumps([clip.answers for clip in clips])})
    return clips


@torch.no_grad()
def encode(
    model: Qwen2AudioForConditionalGeneration, processor: Qwen2AudioProcessor, utterances: Sequence[Utterance]
) -> list[Clip]:
    """Run the audio tower once per clip, and measure the voice."""
    clips = []
    longest = processor.feature_extractor.n_samples
    for utterance in tqdm(utterances, desc="encoding", unit="clip"):
        sound = load_waveform(utterance, RATE)[:longest]
        made = processor.feature_extractor(
            sound, sampling_rate=RATE, return_tensors="pt", padding="max_length", return_attention_mask=True
        )  # of frames; without the last argument it is of samples
        frames = int(made["attention_mask"].sum())
        # the first convolutions see two frames more than the encoder attends to
        audio = tower_output(model, made["input_features"][:, :, : frames + 3], frames)[0]
        answers = {"emotion": str(utterance.emotion), **voice_of(np.asarray(sound))}
        clips.append(Clip(utterance.speaker, audio.half(), answers))
    return clips


def voice_of(sound: NDArray[np.float32]) -> dict[str, str]:
    """The answers about the voice: the middle pitch of voiced frames, by autocorrelation, and the level."""
    frame, hop = 640, 320
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(sound, (0, frame)), frame)[::hop] * np.hanning(frame)
    spectrum = np.abs(np.fft.rfft(frames, 2 * frame)) ** 2
    correlation = np.fft.irfft(spectrum)[:, :frame]
    power = correlation[:, 0]
    lags = slice(RATE // int(PITCH_HZ[1]), RATE // int(PITCH_HZ[0]))
    # a longer lag leaves less of the frame to correlate
    peaks = correlation[:, lags] / (np.hanning(2 * frame)[frame:] + 1e-3)[lags]
    best = peaks.argmax(1)
    voiced = (peaks.max(1) > 0.5 * power) & (power > 1e-3 * power.max())
    pitch = RATE / (np.median(best[voiced]) + lags.start) if voiced.any() else PITCH_HZ[0]
    level = 10 * math.log10(float(np.mean(np.square(sound, dtype=np.float64))) + 1e-10)
    return {
        "pitch": _step(math.log(pitch), (math.log(PITCH_HZ[0]), math.log(PITCH_HZ[1]))),
        "loudness": _step(level, LOUDNESS_DB),
    }


def _step(value: float, scale: tuple[float, float]) -> str:
    return str(min(STEPS - 1, max(0, int((value - scale[0]) / (scale[1] - scale[0]) * STEPS))))


def by_speaker(clips: Sequence[Clip], seed: int, share: float = 0.15) -> tuple[list[Clip], list[Clip]]:
    """(train, dev): no speaker is in both."""
    speakers = sorted({clip.speaker for clip in clips})
    held_out = set(np.random.default_rng(seed).permutation(speakers)[: max(1, round(share * len(speakers)))])
    return [c for c in clips if c.speaker not in held_out], [c for c in clips if c.speaker in held_out]


def train_host(
    model: Qwen2AudioForConditionalGeneration,
    processor: Qwen2AudioProcessor,
    train: Sequence[Clip],
    dev: Sequence[Clip],
    *,
    steps: int = 250,
    batch_size: int = 24,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> float:
    """Train projector and decoder with AdamW, a short warm-up and a cosine decay; keep the step that is best on dev.

    Returns:
        The accuracy of the emotion on dev at that step, the mean over its speakers.
    """
    rows = Rows(processor)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / max(1, steps // 20), 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    order = np.random.default_rng(seed)
    groups: dict[str, dict[str, list[Clip]]] = {}
    for clip in train:
        groups.setdefault(clip.answers["emotion"], {}).setdefault(clip.speaker, []).append(clip)
    others = [task for task in QUESTIONS if task != "emotion"]
    best, kept = 0.0, {}
    every = max(1, steps // 20)
    with tqdm(range(1, steps + 1), desc="training the host", unit="step", mininterval=5) as bar:
        for step in bar:
            # all emotions, and of each all speakers equally often, however many clips they have
            picked = [_one(_one(_one(groups, order), order), order) for _ in range(batch_size)]
            model.train()
            emotion, other = rows.losses(model, picked, ["emotion", others[step % len(others)]], order)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(emotion + 0.5 * other)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if step % every == 0 or step == steps:
                accuracy = rows.accuracy(model.eval(), dev)
                bar.set_postfix(loss=f"{emotion:.3f}", accuracy=f"{accuracy:.3f}")
                if accuracy >= best:
                    best = accuracy
                    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
                    kept = {n: v.clone() for n, v in model.state_dict().items() if n in trained}
    model.load_state_dict(kept, strict=False)
    model.requires_grad_(False).eval()
    return best


class Rows:
    """The chats of a batch: the audio, then each question with its answer; first the emotion, as in use."""

    def __init__(self, processor: Qwen2AudioProcessor) -> None:
        tokenizer = processor.tokenizer

        def ids(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        before, after = prompt_text(processor, "QUESTION").split("QUESTION")
        audio = before.index(processor.audio_token)
        self._before = ids(before[:audio])
        first = before[audio + len(processor.audio_token) :]
        later = "<|im_end|>\n<|im_start|>user\n"
        self._first = {task: ids(first + question + after) for task, question in QUESTIONS.items()}
        self._later = {task: ids(later + question + after) for task, question in QUESTIONS.items()}
        self._answer = {text: found for text in tokenizer.get_vocab() if len(found := ids(text)) == 1}

    def losses(
        self,
        model: Qwen2AudioForConditionalGeneration,
        clips: Sequence[Clip],
        tasks: Sequence[str],
        order: np.random.Generator,
    ) -> list[Tensor]:
        """The mean cross entropy of each task's answer, of random parts of the audio."""
        audios = [functional.dropout(_part(clip.audio.float(), order), 0.3) for clip in clips]
        logits, answers = self._logits(model, clips, audios, tasks)
        return [functional.cross_entropy(z, a, label_smoothing=0.1) for z, a in zip(logits, answers, strict=True)]

    @torch.no_grad()
    def accuracy(self, model: Qwen2AudioForConditionalGeneration, clips: Sequence[Clip]) -> float:
        """Of the emotion, the mean over speakers."""
        right: dict[str, list[bool]] = {}
        for start in range(0, len(clips), 32):
            some = clips[start : start + 32]
            (logits,), (answers,) = self._logits(model, some, [clip.audio.float() for clip in some], ["emotion"])
            for clip, is_right in zip(some, (logits.argmax(-1) == answers).tolist(), strict=True):
                right.setdefault(clip.speaker, []).append(is_right)
        return float(np.mean([np.mean(answered) for answered in right.values()]))

    def _logits(
        self,
        model: Qwen2AudioForConditionalGeneration,
        clips: Sequence[Clip],
        audios: Sequence[Tensor],
        tasks: Sequence[str],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of each task the logits where its answer is predicted, (batch, vocabulary), and the answers, (batch,)."""
        embed = model.get_input_embeddings()
        rows, places = [], []
        for clip, audio in zip(clips, audios, strict=True):
            pieces = [embed(torch.tensor(self._before)), model.model.multi_modal_projector(audio)]
            at = []
            for place, task in enumerate(tasks):
                asked = (self._later if place else self._first)[task]
                pieces.append(embed(torch.tensor(asked)))
                at.append(sum(map(len, pieces)) - 1)
                pieces.append(embed(torch.tensor(self._answer[clip.answers[task]])))
            rows.append(torch.cat(pieces))
            places.append(at)
        lengths = torch.tensor([len(row) for row in rows])
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        hidden = model.model.language_model(inputs_embeds=padded, attention_mask=mask.long(), use_cache=False)
        found = hidden.last_hidden_state[torch.arange(len(rows))[:, None], torch.tensor(places)]
        answers = [torch.tensor([self._answer[clip.answers[task]][0] for clip in clips]) for task in tasks]
        return list(model.lm_head(found).unbind(1)), answers


def _one(some: Mapping[str, _Item] | Sequence[_Item], order: np.random.Generator) -> _Item:
    values = list(some.values()) if isinstance(some, Mapping) else some
    return values[int(order.integers(len(values)))]


def _part(audio: Tensor, order: np.random.Generator) -> Tensor:
    """Half of the time a random part of at least 60 %, so that few clips teach more."""
    if order.random() < 0.5:
        return audio
    length = max(1, round(len(audio) * order.uniform(0.6, 1.0)))
    start = int(order.integers(len(audio) - length + 1))
    return audio[start : start + length]


if __name__ == "__main__":
    main()
