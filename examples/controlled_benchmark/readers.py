"""Upper bounds for a memory: readers of the whole past, which keep a vector per utterance.

    python examples/controlled_benchmark/readers.py --corpus corpus

Each is a small causal transformer over one vector per utterance, the mean of the hidden states that leave the memory's
layer at the audio positions: `past` alone, `speakers` with the speaker's index beside it, `baselines` with the
speaker's true baselines, which no listener is given. `voice_r2` says how well those vectors expose the voice.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm
from train_memory import speak

from mal_adapter import attach_memory
from mal_adapter.demo import EMOTIONS, HOST_FOLDER, LAYER_IDX, PROMPT
from mal_adapter.demo.dialogues import make_dialogues
from mal_adapter.ser.dialogue import Dialogue
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
from mal_adapter.ser.training.cached_host import CachedHost

__all__ = ["CausalReader", "measure", "pooled", "train_reader", "truth_of", "voice_r2"]

Truth = dict[str, NDArray[Any]]


class CausalReader(nn.Module):
    """A small causal transformer over one vector per utterance."""

    def __init__(self, inputs: int, turns: int, width: int = 96, layers: int = 3, dropout: float = 0.1) -> None:
        super().__init__()
        self.project = nn.Linear(inputs, width)
        self.positions = nn.Parameter(torch.zeros(turns, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.answer = nn.Linear(width, len(EMOTIONS))

    def forward(self, utterances: Float[Tensor, "batch turns inputs"]) -> Float[Tensor, "batch turns labels"]:
        """Logits of the labels."""
        turns = utterances.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(turns)
        hidden = self.body(self.project(utterances) + self.positions[:turns], mask=mask, is_causal=True)
        logits: Tensor = self.answer(hidden)
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", type=Path, default=HOST_FOLDER, help="the shipped one unless given")
    parser.add_argument("--corpus", type=Path, default=Path("corpus"), help="folder for WAV files and activations")
    parser.add_argument("--train-dialogues", type=int, default=3000)
    parser.add_argument("--test-dialogues", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=25)
    options = parser.parse_args()

    model, processor = load_host(str(options.host), device="cpu")
    recognizer = EmotionRecognizer(model, processor, attach_memory(model, LAYER_IDX), EMOTIONS, PROMPT)
    cached = CachedHost(recognizer, recognizer.memory, options.corpus / "activations")
    vectors, truths = [], []
    for split, count in (("train", options.train_dialogues), ("test", options.test_dialogues)):
        vectors.append(pooled(cached, speak(options.corpus / split, split, count)))
        truths.append(truth_of(split, count))
    figures = measure(*vectors, *truths, seed=options.seed, epochs=options.epochs)
    print(json.dumps(figures, indent=2))


@torch.no_grad()
def pooled(cached: CachedHost, dialogues: list[Dialogue]) -> NDArray[np.float32]:
    """Hidden states of the memory's layer, averaged over the audio positions: (dialogues, turns, hidden_size)."""
    vectors = []
    for dialogue in tqdm(dialogues, desc="averaging hidden states", unit="dialogue", mininterval=2):
        cached.keep(dialogue.utterances)
        prepared = cached.prepare(dialogue.utterances)
        mask = prepared.audio_mask[..., None]
        vectors.append(((prepared.inputs["hidden"] * mask).sum(1) / mask.sum(1)).numpy())
    return np.stack(vectors).astype(np.float32)


def truth_of(split: str, count: int) -> Truth:
    """What only the synthesiser knows of the dialogues 0 … count-1 of seed 0.

    Returns:
        `labels` and `speakers`, (dialogues, turns); `voice` and `baselines`, (dialogues, turns, 3): log pitch, level
        and log tract of each utterance, and of its speaker.
    """
    rows: dict[str, list[Any]] = {"labels": [], "speakers": [], "voice": [], "baselines": []}
    for dialogue in make_dialogues(split, 0, count):
        rows["labels"].append([turn.label for turn in dialogue.turns])
        rows["speakers"].append([turn.speaker for turn in dialogue.turns])
        rows["voice"].append([_values(turn.speech) for turn in dialogue.turns])
        rows["baselines"].append([_values(dialogue.speakers[turn.speaker]) for turn in dialogue.turns])
    return {name: np.array(values) for name, values in rows.items()}


def measure(
    train: NDArray[np.float32],
    test: NDArray[np.float32],
    train_truth: Truth,
    test_truth: Truth,
    *,
    seed: int = 0,
    epochs: int = 25,
) -> dict[str, Any]:
    """Train the readers on pooled hidden states and measure them on others: accuracy, accuracy by turn, `voice_r2`."""
    scale = train_truth["baselines"].reshape(-1, 3)
    extras = {
        "past": [np.zeros((*truth["labels"].shape, 0)) for truth in (train_truth, test_truth)],
        "speakers": [2.0 * truth["speakers"][..., None] - 1.0 for truth in (train_truth, test_truth)],
        "baselines": [(truth["baselines"] - scale.mean(0)) / scale.std(0) for truth in (train_truth, test_truth)],
    }
    right = {}
    for name, (extra, test_extra) in extras.items():
        reader = train_reader(_join(train, extra), train_truth["labels"], seed=seed, epochs=epochs, name=name)
        with torch.no_grad():
            answers = reader(torch.from_numpy(_join(test, test_extra))).argmax(-1).numpy()
        right[name] = answers == test_truth["labels"]
    return {
        "accuracy": {name: round(float(hits.mean()), 4) for name, hits in right.items()},
        "by_turn": {name: [round(float(share), 3) for share in hits.mean(0)] for name, hits in right.items()},
        "voice_r2": voice_r2(train, train_truth["voice"], test, test_truth["voice"]),
        "train_dialogues": len(train),
        "test_dialogues": len(test),
    }


def train_reader(
    inputs: NDArray[np.float32], labels: NDArray[np.int64], *, seed: int = 0, epochs: int = 25, name: str = "reader"
) -> CausalReader:
    """Train a causal reader on dialogues: inputs (dialogues, turns, inputs), labels (dialogues, turns)."""
    torch.manual_seed(seed)
    reader = CausalReader(inputs.shape[2], inputs.shape[1]).train()
    x, y = torch.from_numpy(inputs), torch.from_numpy(labels)
    batch_size = 64
    steps = epochs * math.ceil(len(x) / batch_size)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    for _ in tqdm(range(epochs), desc=f"training the reader of {name}", unit="epoch", mininterval=2):
        for rows in torch.split(torch.randperm(len(x)), batch_size):
            loss = functional.cross_entropy(reader(x[rows]).flatten(0, 1), y[rows].flatten())
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return reader.eval()


def voice_r2(
    train: NDArray[np.float32], train_voice: NDArray[Any], test: NDArray[np.float32], test_voice: NDArray[Any]
) -> dict[str, float]:
    """R² of pitch, level and tract read from pooled hidden states by linear regression, on held-out utterances."""
    weights = np.linalg.lstsq(_with_one(train), train_voice.reshape(-1, 3), rcond=None)[0]
    voice = test_voice.reshape(-1, 3)
    error = ((_with_one(test) @ weights - voice) ** 2).mean(0)
    return dict(zip(("log_pitch", "loudness_db", "log_tract"), (1 - error / voice.var(0)).tolist(), strict=True))


def _values(voice: Any) -> tuple[float, float, float]:
    return math.log(voice.pitch_hz), voice.loudness_db, math.log(voice.tract)


def _with_one(inputs: NDArray[np.float32]) -> NDArray[np.float64]:
    flat = inputs.reshape(-1, inputs.shape[-1]).astype(np.float64)
    return np.concatenate([flat, np.ones((len(flat), 1))], axis=1)


def _join(inputs: NDArray[np.float32], extra: NDArray[Any]) -> NDArray[np.float32]:
    """Each vector with zero mean and unit variance, so that neither it nor what is joined to it dominates."""
    even = (inputs - inputs.mean(-1, keepdims=True)) / (inputs.std(-1, keepdims=True) + 1e-6)
    joined: NDArray[np.float32] = np.concatenate([even, extra], axis=2).astype(np.float32)
    return joined


if __name__ == "__main__":
    main()
