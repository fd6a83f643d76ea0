"""Three reference readers on the frozen host: what an adapter starts from, and what it can hope for.

    bare      the host's own answer to one utterance, closed set
    causal    a transformer over the pooled hidden states of all utterances so far: the past, with nothing to forget
    told      the same, told the true baselines of whoever speaks: the ceiling
    ids       (extra) the causal reader, told which of the two speakers it hears

The memory sees exactly what the causal reader sees. Run `python -m mal_adapter.demo.readers` for their accuracies on
held-out dialogues, by turn, and for how well the hidden states expose the voice.
"""

from __future__ import annotations

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

from mal_adapter.demo import EMOTIONS, HOST_FOLDER
from mal_adapter.demo.activations import Activations, HostTail, cache_activations
from mal_adapter.demo.features import load_features
from mal_adapter.demo.host import load_host

__all__ = ["CausalReader", "bare_answers", "main", "measure", "pooled", "train_reader", "voice_r2"]


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


def pooled(activations: Activations) -> NDArray[np.float32]:
    """Hidden states averaged over each utterance's audio positions: float32, (dialogues, turns, width)."""
    pieces = [piece[:, :, activations.audio].astype(np.float32).mean(2) for piece in _pieces(activations.hidden)]
    return np.concatenate(pieces)


def bare_answers(tail: HostTail, activations: Activations) -> NDArray[np.int64]:
    """The label the host itself gives each utterance, (dialogues, turns)."""
    answers = []
    with torch.no_grad():
        for piece in _pieces(activations.hidden):
            rows = torch.from_numpy(piece.reshape(-1, *piece.shape[2:])).float()
            answers.append(tail(rows).argmax(-1).reshape(piece.shape[:2]).numpy())
    return np.concatenate(answers)


def train_reader(
    inputs: NDArray[np.float32], labels: NDArray[np.int64], *, seed: int = 0, epochs: int = 25, name: str = "reader"
) -> CausalReader:
    """Train a causal reader on dialogues: inputs (dialogues, turns, inputs), labels (dialogues, turns)."""
    torch.manual_seed(seed)
    reader = CausalReader(inputs.shape[2], inputs.shape[1]).train()
    x, y = torch.from_numpy(inputs), torch.from_numpy(np.array(labels))
    batch_size = 64
    steps = epochs * math.ceil(len(x) / batch_size)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    for _ in tqdm(range(epochs), desc=f"training the {name} reader", unit="epoch", mininterval=2):
        for rows in torch.split(torch.randperm(len(x)), batch_size):
            loss = functional.cross_entropy(reader(x[rows]).flatten(0, 1), y[rows].flatten())
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return reader.eval()


def voice_r2(
    train: NDArray[np.float32],
    train_truth: NDArray[np.float32],
    test: NDArray[np.float32],
    test_truth: NDArray[np.float32],
) -> dict[str, float]:
    """R² of pitch, level and tract read from pooled hidden states by linear regression, on held-out utterances."""
    weights = np.linalg.lstsq(_with_one(train), train_truth.reshape(-1, 3), rcond=None)[0]
    truth = test_truth.reshape(-1, 3)
    error = ((_with_one(test) @ weights - truth) ** 2).mean(0)
    return dict(zip(("log_pitch", "loudness_db", "log_tract"), (1 - error / truth.var(0)).tolist(), strict=True))


def measure(
    train: Activations, test: Activations, tail: HostTail, *, seed: int = 0, epochs: int = 25
) -> dict[str, object]:
    """Train the readers on `train` and measure them on `test`.

    Returns:
        `accuracy` and `by_turn` per reader, `voice_r2`, and the numbers of dialogues.
    """
    x, x_test = pooled(train), pooled(test)
    scale = train.baselines.reshape(-1, 3)
    extras = {
        "causal": [np.zeros((*part.labels.shape, 0)) for part in (train, test)],
        "ids": [2.0 * part.speakers[..., None] - 1.0 for part in (train, test)],
        "told": [(part.baselines - scale.mean(0)) / scale.std(0) for part in (train, test)],
    }
    right = {"bare": bare_answers(tail, test) == test.labels}
    for name, (extra, extra_test) in extras.items():
        inputs, inputs_test = _join(x, extra), _join(x_test, extra_test)
        reader = train_reader(inputs, train.labels, seed=seed, epochs=epochs, name=name)
        with torch.no_grad():
            right[name] = reader(torch.from_numpy(inputs_test)).argmax(-1).numpy() == test.labels
    return {
        "accuracy": {name: round(float(hits.mean()), 4) for name, hits in right.items()},
        "by_turn": {name: [round(float(share), 3) for share in hits.mean(0)] for name, hits in right.items()},
        "voice_r2": voice_r2(x, train.truth, x_test, test.truth),
        "train_dialogues": len(train),
        "test_dialogues": len(test),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print the readers' accuracies as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", type=Path, default=HOST_FOLDER, help="a host folder; the shipped one by default")
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/demo"), help="where features and activations are kept"
    )
    parser.add_argument("--train-dialogues", type=int, default=3000)
    parser.add_argument("--test-dialogues", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the readers are so small that a second thread costs more than it brings
    model, processor = load_host(options.host)
    counts = {"train": options.train_dialogues, "test": options.test_dialogues}
    train, test = (
        cache_activations(
            model,
            processor,
            load_features(split, options.seed, count, options.cache, workers=options.workers),
            options.cache / f"readers-{split}",
        )
        for split, count in counts.items()
    )
    result = measure(train, test, HostTail(model, processor), seed=options.seed, epochs=options.epochs)
    print(json.dumps(result, indent=2))


def _pieces(array: NDArray[np.float16], dialogues: int = 50) -> list[NDArray[np.float16]]:
    return [array[start : start + dialogues] for start in range(0, len(array), dialogues)]


def _with_one(inputs: NDArray[np.float32]) -> NDArray[np.float64]:
    flat = inputs.reshape(-1, inputs.shape[-1]).astype(np.float64)
    return np.concatenate([flat, np.ones((len(flat), 1))], axis=1)


def _join(inputs: NDArray[np.float32], told: NDArray[Any]) -> NDArray[np.float32]:
    """Each vector with zero mean and unit variance, so that what is told beside it is neither drowned nor loud."""
    centred = inputs - inputs.mean(-1, keepdims=True)
    even = centred / (inputs.std(-1, keepdims=True) + 1e-6)
    joined: NDArray[np.float32] = np.concatenate([even, told], axis=2).astype(np.float32)
    return joined


if __name__ == "__main__":
    main()
