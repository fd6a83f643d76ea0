"""What makes the memory work: one change at a time, on the demo's host, with seeds.

    python -m tests.benchmarks.study --cache .cache/demo      # hours; adds what is missing to study.jsonl
    python -m tests.benchmarks.study --table                  # the tables, as Markdown

Three settings, each trained on 3000 `train` dialogues of seed 0:

    voices  400 steps; the controlled benchmark: an emotion is a shift from the speaker's private baseline
    mood    400 steps; the same utterances dealt anew: each has another voice, and what persists is the emotion
    final   2000 steps; the demo's own configuration against the simple memories of its width, on the voices

The first two are measured on 300 `dev` dialogues of seed 0, the last on 300 `test` dialogues of seed 0, which chose
nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import mal_adapter.chunk
from mal_adapter import MemoryAdapter, MemoryConfig
from mal_adapter.demo import EMOTIONS, HOST_FOLDER, LAYER_IDX
from mal_adapter.demo.activations import Activations, HostTail, cache_activations
from mal_adapter.demo.features import load_features
from mal_adapter.demo.host import load_host
from mal_adapter.demo.training import STEPS as STEPS_OF_DEMO
from mal_adapter.demo.training import audit, demo_config, fit

RESULTS = Path(__file__).with_name("study.jsonl")
COUNTS = {"train": 3000, "dev": 300, "test": 300}
STEPS = {"voices": 400, "mood": 400, "final": STEPS_OF_DEMO}
BASE = {"memory_dim": 64, "num_heads": 1, "depth": 1, "dropout": 0.1}
MOOD = 0.75  # probability that an utterance of the setting "mood" has its dialogue's emotion


DEMO = {name: value for name, value in demo_config(1).to_dict().items() if name != "hidden_size"}


class Variant(NamedTuple):
    """One change of the base."""

    changes: Mapping[str, Any] = MappingProxyType({})
    tweak: Callable[[MemoryAdapter, Activations], None] = lambda adapter, activations: None
    layer_idx: int = LAYER_IDX
    trusted: bool = True


def no_constant(adapter: MemoryAdapter, _: Activations) -> None:
    """Keys and queries without the learned constant component."""
    for rows in _keys_and_queries(adapter):
        _hold_at_zero(adapter.in_proj.bias, rows)


def frozen_start(adapter: MemoryAdapter, _: Activations) -> None:
    """Initial weights are not learned: no persistent memory."""
    adapter.initial.requires_grad_(False)


def answer_alone(adapter: MemoryAdapter, _: Activations) -> None:
    """The read-out does not see the token."""
    _hold_at_zero(adapter.readout_in.weight, (slice(None), slice(adapter.config.memory_dim, None)))


def pooled_keys(adapter: MemoryAdapter, _: Activations) -> None:
    """Keys and queries see the mean of the utterance alone."""
    for rows in _keys_and_queries(adapter):
        _hold_at_zero(adapter.in_proj.weight, rows)


@torch.no_grad()
def stable_keys(adapter: MemoryAdapter, activations: Activations) -> None:
    """Keys start as the directions in which utterances of one dialogue are alike: of the voice, told by no label."""
    width = adapter.config.memory_dim
    hidden = torch.from_numpy(activations.hidden[:600]).float()
    voices = functional.layer_norm(hidden[:, :, activations.audio], hidden.shape[-1:]).mean(2)
    voices -= voices.mean((0, 1))
    flat = voices.flatten(0, 1)
    spread = flat.T @ flat / len(flat) + 1e-4 * torch.eye(voices.shape[-1])
    alike = voices.mean(1).T @ voices.mean(1) / len(voices)
    whitening = torch.linalg.inv(torch.linalg.cholesky(spread))
    directions = torch.linalg.eigh(whitening @ alike @ whitening.T).eigenvectors.flip(-1)[:, :width].T @ whitening
    directions *= 0.1 * adapter.in_proj.weight[:width].norm() / directions.norm()
    assert adapter.pool_proj is not None
    for rows in _keys_and_queries(adapter):
        adapter.pool_proj.weight[rows] = 10 * directions
        adapter.in_proj.weight[rows] = directions


VARIANTS: dict[str, dict[str, Variant]] = {
    "voices": {
        "base": Variant(),
        "running mean": Variant({"update": "running_mean"}),
        "GRU": Variant({"update": "gru"}),
        "depth 2": Variant({"depth": 2}),
        "2 heads": Variant({"num_heads": 2}),
        "4 heads": Variant({"num_heads": 4}),
        "width 32": Variant({"memory_dim": 32}),
        "width 128": Variant({"memory_dim": 128}),
        "chunks of 6 tokens": Variant({"chunk_size": 6}),
        "chunks of 2 tokens": Variant({"chunk_size": 2}),
        "nothing pooled": Variant({"pool_utterance": False}),
        "keys pooled alone": Variant(tweak=pooled_keys),
        "no constant component": Variant(tweak=no_constant),
        "initial weights not learned": Variant(tweak=frozen_start),
        "keys start at stable directions": Variant(tweak=stable_keys),
        "read-out without the token": Variant(tweak=answer_alone),
        "read-out twice as wide": Variant({"readout_dim": 128}),
        "no momentum": Variant({"momentum_bias": -20.0}),
        "more momentum (η 0.88)": Variant({"momentum_bias": 2.0}),
        "smaller steps (θ 0.0025)": Variant({"step_bias": -6.0}),
        "larger steps (θ 0.12)": Variant({"step_bias": -2.0}),
        "more forgetting (α 0.018)": Variant({"forget_bias": -4.0}),
        "no forgetting": Variant({"forget_bias": -20.0}),
        "no trust region": Variant(trusted=False),
        "no trust region, larger steps": Variant({"step_bias": -2.0}, trusted=False),
        "no dropout": Variant({"dropout": 0.0}),
        "layer 0": Variant(layer_idx=0),
        "layer 2": Variant(layer_idx=2),
    },
    "mood": {
        "base": Variant(),
        "running mean": Variant({"update": "running_mean"}),
        "GRU": Variant({"update": "gru"}),
        "depth 2": Variant({"depth": 2}),
        "4 heads": Variant({"num_heads": 4}),
        "no constant component": Variant(tweak=no_constant),
        "nothing pooled": Variant({"pool_utterance": False}),
    },
    "final": {
        "demo": Variant(DEMO),
        "running mean": Variant({**DEMO, "update": "running_mean"}),
        "GRU": Variant({**DEMO, "update": "gru"}),
        "demo at layer 0": Variant(DEMO, layer_idx=0),
    },
}


def run(setting: str, name: str, seed: int, cache: Path) -> dict[str, Any]:
    """Train one variant from one seed and audit it."""
    variant, steps = VARIANTS[setting][name], STEPS[setting]
    train, dev, tail = load(setting, variant.layer_idx, cache)
    torch.manual_seed(seed)
    config = MemoryConfig(hidden_size=train.hidden.shape[-1], **{**BASE, **variant.changes})
    adapter = MemoryAdapter(config)
    variant.tweak(adapter, train)
    with contextlib.nullcontext() if variant.trusted else mock.patch.object(mal_adapter.chunk, "_bound", _all_of_it):
        fit(adapter, train, tail, steps=steps, seed=seed)
        by_turn = audit(adapter, dev, tail)
    parameters = sum(parameter.numel() for parameter in adapter.parameters())
    return {"setting": setting, "variant": name, "seed": seed, "steps": steps, "parameters": parameters, **by_turn}


def load(setting: str, layer_idx: int, cache: Path) -> tuple[Activations, Activations, HostTail]:
    """Activations of the two splits, and the host above the layer."""
    model, processor = load_host(HOST_FOLDER)
    model.requires_grad_(False)
    parts = []
    for split in ("train", "test" if setting == "final" else "dev"):
        count = COUNTS[split]
        features = load_features(split, 0, count, cache, workers=1)
        folder = cache / f"study-{split}-layer{layer_idx}"
        if not (folder / "done").exists():
            cache_activations(model, processor, features, folder, layer_idx)
            (folder / "done").touch()
        activations = Activations.load(folder, features, processor)
        parts.append(deal_by_mood(activations, seed=len(parts)) if setting == "mood" else activations)
    return parts[0], parts[1], HostTail(model, processor, layer_idx=layer_idx)


def deal_by_mood(activations: Activations, seed: int) -> Activations:
    """As many dialogues of the same utterances, each with one prevailing emotion and a new voice at every turn."""
    rng = np.random.default_rng(seed)
    dialogues, turns = activations.labels.shape
    mood = rng.integers(len(EMOTIONS), size=(dialogues, 1))
    other = (mood + rng.integers(1, len(EMOTIONS), size=(dialogues, turns))) % len(EMOTIONS)
    wanted = np.where(rng.random((dialogues, turns)) < MOOD, mood, other)
    dealt = np.empty(dialogues * turns, dtype=np.int64)
    for label in range(len(EMOTIONS)):
        places = np.flatnonzero(wanted.ravel() == label)
        dealt[places] = rng.choice(np.flatnonzero(activations.labels.ravel() == label), size=len(places))

    def deal(values: Any) -> Any:
        return values.reshape(-1, *values.shape[2:])[dealt].reshape(values.shape)

    fields = ("hidden", "labels", "speakers", "truth", "baselines")
    hidden, *rest = (deal(getattr(activations, name)) for name in fields)
    return Activations(hidden, activations.audio, *rest)


def table(results: list[dict[str, Any]], setting: str) -> Iterator[str]:
    """Markdown rows: mean and spread of the accuracies over seeds, the best first."""
    yield "| | parameters | seeds | accuracy | turns 5–10 | reset | swapped | mixed | shuffled |"
    yield "|---|---|---|---|---|---|---|---|---|"
    rows = []
    for name in dict.fromkeys(r["variant"] for r in results if r["setting"] == setting):
        runs = [r for r in results if r["setting"] == setting and r["variant"] == name]
        over = {
            key: [statistics.mean(r[key]) for r in runs] for key in ("right", "reset", "swapped", "mixed", "shuffled")
        }
        late = [statistics.mean(r["right"][4:]) for r in runs]
        cells = [name, f"{runs[0]['parameters']:,}".replace(",", " "), str(len(runs)), _spread(over["right"])]
        cells += [_spread(late), *(_spread(over[key]) for key in ("reset", "swapped", "mixed", "shuffled"))]
        rows.append((statistics.mean(over["right"]), cells))
    bare = [r["bare"] for r in results if r["setting"] == setting]
    yield f"| *bare host* | | | {statistics.mean(bare[0]):.3f} | {statistics.mean(bare[0][4:]):.3f} | | | | |"
    for _, cells in sorted(rows, key=lambda row: row[0], reverse=True):
        yield "| " + " | ".join(cells) + " |"


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def _keys_and_queries(adapter: MemoryAdapter) -> tuple[slice, slice]:
    width = adapter.config.memory_dim
    return slice(0, width), slice(2 * width, 3 * width)


def _hold_at_zero(parameter: torch.nn.Parameter, part: Any) -> None:
    keep = torch.ones_like(parameter)
    keep[part] = 0
    parameter.data.mul_(keep)
    parameter.register_hook(lambda gradient: gradient * keep)


def _all_of_it(totals: Tensor) -> Tensor:
    return torch.ones_like(totals[..., :1])


def main() -> None:
    """Run what is missing from the results, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".cache/demo"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON lines, one per run")
    parser.add_argument("--settings", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--variants", nargs="+", help="all unless given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)

    def results() -> list[dict[str, Any]]:
        return [json.loads(line) for line in options.results.read_text().splitlines()]

    if options.table:
        for setting in options.settings:
            print(f"### {setting}\n", *table(results(), setting), "", sep="\n")
        return
    options.results.touch()
    for seed in options.seeds:
        for setting in options.settings:
            for name in VARIANTS[setting]:
                done = {(r["setting"], r["variant"], r["seed"]) for r in results()}
                wanted = options.variants is None or name in options.variants
                if not wanted or (setting, name, seed) in done:
                    continue
                result = run(setting, name, seed, options.cache)
                with options.results.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                print(setting, name, seed, f"{statistics.mean(result['right']):.3f}", flush=True)


if __name__ == "__main__":
    main()
