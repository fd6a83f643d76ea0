"""Which parts of a memory gain on real speech? A proxy that takes seconds a run: one vector per clip, a small host.

    python examples/real_speech/levers.py voices-0 voices-1 voices-2 --whisper openai/whisper-base

Each folder is one fold of `mal-adapter simulate`. A clip is the mean and the spread of what leaves the encoder. The
host is a classifier of single clips, trained on `host.jsonl`. Memories are trained on `train.jsonl`, their best step is
chosen on `dev.jsonl`, and they are measured on `test.jsonl`, beside the same read-out without a past.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from make_host import build_host, encode_once
from torch import Tensor, nn
from whisper_encoder import load_encoder

from mal_adapter.ser.dialogue import Dialogue, Utterance, read_manifest

SECONDS, WIDTH = 4, 128
SPLITS = ("train", "dev", "test")


class Host(nn.Module):
    """Emotions of single clips; a memory adds to what is between its two parts."""

    def __init__(self, inputs: int, emotions: int) -> None:
        super().__init__()
        self.lower = nn.Sequential(nn.Dropout(0.3), nn.Linear(inputs, WIDTH))
        self.upper = nn.Sequential(
            nn.GELU(), nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, emotions)
        )

    def forward(self, clips: Tensor) -> Tensor:
        return self.upper(self.lower(clips))  # type: ignore[no-any-return]


class Memory(nn.Module):
    """One change of a simple memory and its read-out.

    Args:
        emotions: The number of emotions.
        rule: A running mean, a GRU, or a matrix with keys (one Titans head without momentum).
        token: Whether the read-out sees the clip beside the memory's answer.
        belief: Whether the host's log-probabilities of the emotions are written beside the clip.
        width: Of the memory and of the read-out.
    """

    def __init__(
        self,
        emotions: int,
        rule: Literal["mean", "gru", "matrix"] = "mean",
        *,
        token: bool = True,
        belief: bool = False,
        width: int = 32,
    ) -> None:
        super().__init__()
        self.rule, self.width = rule, width
        self.norm, self.key, self.value = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, width), nn.Linear(WIDTH, width)
        self.belief = nn.Linear(emotions, width, bias=False) if belief else None
        self.token = nn.Linear(WIDTH, width) if token else None
        self.cell = nn.GRUCell(width, width) if rule == "gru" else None
        self.step = nn.Parameter(torch.zeros(()))
        seen = 2 * width if token else width
        self.evidence, self.gated = nn.LayerNorm(seen), nn.Linear(seen, 2 * width)
        self.dropout, self.out = nn.Dropout(0.1), nn.Linear(width, WIDTH, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, host: Host, hidden: Tensor, past: Literal["own", "other", "none"] = "own") -> Tensor:
        """Scores of the emotions, (dialogues, turns, emotions), of `hidden`, (dialogues, turns, WIDTH)."""
        shape = (self.width, self.width) if self.rule == "matrix" else (self.width,)
        memory, answers = hidden.new_zeros(len(hidden), *shape), list[Tensor]()
        for plain, x in zip(hidden.unbind(1), self.norm(hidden).unbind(1), strict=True):
            key = F.normalize(self.key(x), dim=-1)
            read = memory.roll(1, 0) if past == "other" else memory
            answer = (read * key[:, :, None]).sum(1) if self.rule == "matrix" else read
            seen = answer if self.token is None else torch.cat((answer, self.token(x)), -1)
            value, gate = self.gated(self.evidence(seen)).chunk(2, -1)
            answers.append(host.upper(plain + self.out(self.dropout(value * gate.sigmoid()))))
            if past == "none":
                continue
            written = self.value(x)
            if self.belief is not None:
                written = written + self.belief(answers[-1].log_softmax(-1).detach())
            memory = self._write(memory, key, written, len(answers))
        return torch.stack(answers, 1)

    def _write(self, memory: Tensor, key: Tensor, value: Tensor, turn: int) -> Tensor:
        if self.cell is not None:
            return self.cell(value, memory)  # type: ignore[no-any-return]
        if self.rule == "mean":
            return memory + (value - memory) / turn
        error = value - (memory * key[:, :, None]).sum(1)
        return memory + self.step.sigmoid() * key[:, :, None] * error[:, None]


@dataclass(frozen=True)
class Run:
    """How a lever is trained."""

    memory: Mapping[str, Any]
    past: Literal["own", "none"] = "own"
    contrast: float = 0.0
    """weight of a loss that asks the own past to be better than another dialogue's by 0.1 nats"""


BEHIND = {"token": False}
RUNS = {
    "control": Run({}, "none"),
    "control, read-out without the clip": Run(BEHIND, "none"),
    "mean": Run({}),
    "mean, read-out without the clip": Run(BEHIND),
    "mean, read-out without the clip, belief written": Run({**BEHIND, "belief": True}),
    "mean, read-out without the clip, width 8": Run({**BEHIND, "width": 8}),
    "mean, read-out without the clip, contrast": Run(BEHIND, contrast=1.0),
    "GRU, read-out without the clip": Run({**BEHIND, "rule": "gru"}),
    "matrix": Run({"rule": "matrix"}),
    "matrix, read-out without the clip": Run({**BEHIND, "rule": "matrix"}),
    "matrix, read-out without the clip, belief written": Run({**BEHIND, "rule": "matrix", "belief": True}),
}


@dataclass(frozen=True)
class Fold:
    """Clips by number, per split: (dialogues, turns)."""

    clips: Mapping[str, Tensor]


def train(run: Run, host: Host, hidden: Tensor, truth: Tensor, fold: Fold, *, seed: int, steps: int) -> Memory:
    """Train one memory; the best of every 50 steps on dev is returned."""
    torch.manual_seed(seed)
    memory, order = Memory(int(truth.max()) + 1, **run.memory), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(memory.parameters(), 3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)

    def losses(clips: Tensor, past: Literal["own", "other", "none"]) -> Tensor:
        scores = memory(host, hidden[clips], past)
        return F.cross_entropy(scores.flatten(0, 1), truth[clips].flatten(), reduction="none").view(clips.shape)

    best, found = float("inf"), copy.deepcopy(memory)
    for step in range(1, steps + 1):
        memory.train()
        clips = fold.clips["train"][order.integers(len(fold.clips["train"]), size=64)]
        own = losses(clips, run.past)
        loss = own.mean()
        if run.contrast:
            loss = loss + run.contrast * F.relu(0.1 + (own - losses(clips, "other"))[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(memory.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            memory.eval()
            with torch.no_grad():
                dev = losses(fold.clips["dev"], run.past).mean().item()
            if dev < best:
                best, found = dev, copy.deepcopy(memory)
    return found.eval()


def train_host(clips: Tensor, truth: Tensor, seed: int) -> Host:
    """Fifteen passes over the host's clips."""
    torch.manual_seed(seed)
    host, order = Host(clips.shape[1], int(truth.max()) + 1), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(host.parameters(), 1e-3, weight_decay=0.1)
    for _ in range(15):
        for batch in np.array_split(order.permutation(len(clips)), max(1, len(clips) // 64)):
            optimizer.zero_grad()
            F.cross_entropy(host(clips[batch]), truth[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return host.eval().requires_grad_(False)


def interval(differences: Sequence[Tensor]) -> tuple[float, float]:
    """(Mean, half of the 95 % interval over dialogues) of differences by dialogue; seeds are averaged first."""
    by_dialogue = torch.stack(list(differences)).mean(0)
    return 100 * by_dialogue.mean().item(), 196 * by_dialogue.std().item() / len(by_dialogue) ** 0.5


def read_fold(folder: Path, number: Mapping[Utterance, int]) -> Fold:
    """The dialogues of a fold; all of them have the same number of turns."""
    return Fold(
        {
            split: torch.tensor([[number[_clip(turn)] for turn in one.utterances] for one in _dialogues(folder, split)])
            for split in SPLITS
        }
    )


def _dialogues(folder: Path, split: str) -> list[Dialogue]:
    return read_manifest(folder / f"{split}.jsonl")


def _clip(turn: Utterance) -> Utterance:
    """The same clip in any dialogue."""
    return Utterance("clip", "0", turn.speaker, turn.audio, emotion=turn.emotion)


def _all_clips(folders: Sequence[Path]) -> Iterator[Utterance]:
    for folder in folders:
        for split in ("host", *SPLITS):
            yield from (_clip(turn) for one in _dialogues(folder, split) for turn in one.utterances)


def compare(
    folders: Sequence[Path], clips: Tensor, truth: Tensor, number: Mapping[Utterance, int], *, seeds: int, steps: int
) -> Iterator[str]:
    """The rows of a table, over all folds and seeds.

    Args:
        folders: The folds.
        clips: (clips, inputs), standardised.
        truth: (clips,) emotions by number.
        number: The row of each clip.
        seeds: How many, from 0.
        steps: Of each training.
    """
    own: dict[str, list[float]] = {name: [] for name in ("host alone", *RUNS)}
    other: dict[str, list[float]] = {name: [] for name in RUNS}
    gains: dict[str, list[list[Tensor]]] = {name: [[] for _ in folders] for name in RUNS}
    for seed in range(seeds):
        for place, folder in enumerate(folders):
            fold = read_fold(folder, number)
            known = torch.tensor([number[_clip(t)] for d in _dialogues(folder, "host") for t in d.utterances])
            host = train_host(clips[known], truth[known], seed)
            hidden, test = host.lower(clips), fold.clips["test"]

            def right(scores: Tensor, test: Tensor = test) -> Tensor:
                return (scores.argmax(-1) == truth[test]).float().mean(1)

            own["host alone"].append(right(host.upper(hidden[test])).mean().item())
            by_run: dict[str, Tensor] = {}
            for name, run in RUNS.items():
                memory = train(run, host, hidden, truth, fold, seed=seed, steps=steps)
                with torch.no_grad():
                    by_run[name] = right(memory(host, hidden[test], run.past))
                    away = by_run[name] if run.past == "none" else right(memory(host, hidden[test], "other"))
                own[name].append(by_run[name].mean().item())
                other[name].append(away.mean().item())
                control = "control" if run.memory.get("token", True) else "control, read-out without the clip"
                gains[name][place].append(by_run[name] - by_run[control])
    yield "| | own past | another dialogue's | own past − its control (95 % over dialogues) |"
    yield "|---|---|---|---|"
    yield f"| host alone | {statistics.mean(own['host alone']):.3f} | | |"
    for name in RUNS:
        mean, half = interval([torch.cat(by_seed) for by_seed in zip(*gains[name], strict=True)])
        figures = f"{statistics.mean(own[name]):.3f} | {statistics.mean(other[name]):.3f}"
        yield f"| {name} | {figures} | {mean:+.1f} ± {half:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folds", type=Path, nargs="+", help="folders of mal-adapter simulate")
    parser.add_argument("--whisper", required=True, help="folder or Hub id of a Whisper, or a folder of CTranslate2")
    parser.add_argument("--encoded", type=Path, default=Path("levers-encoded.safetensors"), help="cache of the clips")
    parser.add_argument("--layers", type=int, default=4, help="of Whisper's encoder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250)
    options = parser.parse_args()
    torch.set_num_threads(1)

    utterances = list(dict.fromkeys(_all_clips(options.folds)))
    number = {utterance: n for n, utterance in enumerate(utterances)}
    emotions = sorted({str(utterance.emotion) for utterance in utterances})
    truth = torch.tensor([emotions.index(str(utterance.emotion)) for utterance in utterances])
    sizes = {"layers": options.layers, "seconds": SECONDS, "width": WIDTH, "decoder_layers": 1, "seed": 0}
    model, processor = build_host(load_encoder(options.whisper), emotions, **sizes)
    encoder = [options.whisper, options.layers, SECONDS]
    encoded = encode_once(model, processor, utterances, options.encoded, encoder)
    clips = torch.stack([torch.cat((clip.audio.float().mean(0), clip.audio.float().std(0))) for clip in encoded])
    clips = (clips - clips.mean(0)) / (clips.std(0) + 1e-5)
    print(*compare(options.folds, clips, truth, number, seeds=options.seeds, steps=options.steps), sep="\n")


if __name__ == "__main__":
    main()
