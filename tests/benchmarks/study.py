"""What makes the memory work: one change at a time, on the demo's host, with seeds.

    python -m tests.benchmarks.study --cache .cache/study     # hours; adds what is missing to study.jsonl
    python -m tests.benchmarks.study --table                  # the tables, as Markdown

Four settings, each trained by `train_memory` on 3000 `train` dialogues of seed 0, as settings.json of the controlled
benchmark (examples/controlled_benchmark) has it:

    voices  2 epochs; an emotion is a shift from the speaker's private baseline
    mood    2 epochs; the same utterances dealt into new dialogues: each has another voice, and what persists is the
            emotion
    tokens  2 epochs, on the voices; the memory gets each utterance as 1, 4 or 50 tokens instead of 18, with the gates'
            start for that length or as they are per token
    final   the shipped memory's own configuration against the simple memories of its width, on the voices

The first three are measured on 300 `dev` dialogues of seed 0, the last on 300 `test` dialogues of seed 0, by which
nothing was chosen.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import mal_adapter.memory.chunk
from mal_adapter import MemoryAdapter, MemoryConfig, MemoryState, attach_memory
from mal_adapter.demo import EMOTIONS, HOST_FOLDER, LAYER_IDX, PROMPT
from mal_adapter.demo.dialogues import make_dialogues, write_wavs
from mal_adapter.memory.spans import Spans
from mal_adapter.ser.dialogue import Dialogue, Utterance, read_manifest
from mal_adapter.ser.evaluation import Evaluation, evaluate
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
from mal_adapter.ser.training import TrainingConfig, train_memory
from mal_adapter.ser.training.cached_host import CachedHost

RESULTS = Path(__file__).with_name("study.jsonl")
SETTINGS = json.loads((Path(__file__).parents[2] / "examples/controlled_benchmark/settings.json").read_text())
SHIPPED = SETTINGS.pop("memory")
COUNTS = {"train": 3000, "dev": 300, "test": 300}
EPOCHS = {"voices": 2, "mood": 2, "tokens": 2, "final": SETTINGS["epochs"]}
BASE = {"memory_dim": 64, "num_heads": 1, "depth": 1, "dropout": 0.1}
MOOD = 0.75  # probability that an utterance of the setting "mood" has its dialogue's emotion

Voices = Callable[[], Tensor]
"""Hidden states of training utterances at the audio positions, (dialogues, turns, audio tokens, hidden_size)."""


class Variant(NamedTuple):
    """One change of the base."""

    changes: Mapping[str, Any] = MappingProxyType({})
    tweak: Callable[[MemoryAdapter, Voices], None] = lambda adapter, voices: None
    layer_idx: int = LAYER_IDX
    trusted: bool = True
    tokens: int | None = None


def no_constant(adapter: MemoryAdapter, _: Voices) -> None:
    """Keys and queries without the learned constant component."""
    for rows in _keys_and_queries(adapter):
        _hold_at_zero(adapter.in_proj.bias, rows)


def frozen_start(adapter: MemoryAdapter, _: Voices) -> None:
    """Initial weights are not learned: no persistent memory."""
    adapter.initial.requires_grad_(False)


@contextlib.contextmanager
def tokens_per_utterance(count: int | None) -> Iterator[None]:
    """Within this block a memory is written means of pieces of an utterance, so that it gets `count` tokens of each."""
    if count is None:
        yield
        return
    write_tokens = MemoryAdapter.write_tokens

    def write(
        self: MemoryAdapter,
        state: MemoryState,
        tokens: Tensor,
        spans: Spans,
        valid: None = None,
        *,
        causal: bool = False,
    ) -> MemoryState:
        rows = [functional.adaptive_avg_pool1d(row.T[None], count)[0].T for row in tokens.split(list(spans.lengths))]
        return write_tokens(self, state, torch.cat(rows), Spans([count] * len(rows), tokens.device), causal=causal)

    with mock.patch.object(MemoryAdapter, "write_tokens", write):
        yield


def answer_alone(adapter: MemoryAdapter, _: Voices) -> None:
    """The read-out does not see the token."""
    _hold_at_zero(adapter.readout_in.weight, (slice(None), slice(adapter.config.memory_dim, None)))


def pooled_keys(adapter: MemoryAdapter, _: Voices) -> None:
    """Keys and queries see the mean of the utterance alone."""
    for rows in _keys_and_queries(adapter):
        _hold_at_zero(adapter.in_proj.weight, rows)


@torch.no_grad()
def stable_keys(adapter: MemoryAdapter, voices_of: Voices) -> None:
    """Keys start as the directions in which the utterances of a dialogue are similar, found without labels."""
    width = adapter.config.memory_dim
    hidden = voices_of()
    voices = functional.layer_norm(hidden, hidden.shape[-1:]).mean(2)
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
        "past answers kept": Variant({"num_labels": len(EMOTIONS)}),
    },
    "mood": {
        "base": Variant(),
        "running mean": Variant({"update": "running_mean"}),
        "GRU": Variant({"update": "gru"}),
        "depth 2": Variant({"depth": 2}),
        "4 heads": Variant({"num_heads": 4}),
        "no constant component": Variant(tweak=no_constant),
        "nothing pooled": Variant({"pool_utterance": False}),
        "past answers kept": Variant({"num_labels": len(EMOTIONS)}),
        "past answers alone": Variant({"num_labels": len(EMOTIONS), "update": "answers"}),
    },
    "tokens": {
        name: Variant(changes, tokens=count)
        for count in (1, 4, 50)
        for name, changes in (
            (f"tokens: {count}", {}),
            (f"tokens: {count}, gates as for 18", {"utterance_tokens": 18}),
        )
    },
    "final": {
        "demo": Variant(SHIPPED),
        "control without a past": Variant({**SHIPPED, "update": "none"}),
        "running mean": Variant({**SHIPPED, "update": "running_mean"}),
        "GRU": Variant({**SHIPPED, "update": "gru"}),
        "demo at layer 0": Variant(SHIPPED, layer_idx=0),
    },
}


def run(setting: str, name: str, seed: int, cache: Path) -> dict[str, Any]:
    """Train one variant from one seed and audit it."""
    variant = VARIANTS[setting][name]
    train, test = dialogues_of(setting, cache)
    model, processor = load_host(str(HOST_FOLDER), device="cpu")
    torch.manual_seed(seed)
    hidden_size = model.config.get_text_config().hidden_size
    config = MemoryConfig.from_dict({"hidden_size": hidden_size, **BASE, **variant.changes})
    memory = attach_memory(model, variant.layer_idx, config=config)
    recognizer = EmotionRecognizer(model, processor, memory, EMOTIONS, PROMPT)
    activations = cache / "activations"
    variant.tweak(memory.adapter, lambda: voices_of(recognizer, train[:600], activations))
    output = cache / "runs" / f"{setting} {name} {seed}"
    training = TrainingConfig.from_dict({**SETTINGS, "epochs": EPOCHS[setting], "seed": seed})
    with (
        tokens_per_utterance(variant.tokens),
        contextlib.nullcontext()
        if variant.trusted
        else mock.patch.object(mal_adapter.memory.chunk, "_bound", _all_of_it),
    ):
        train_memory(recognizer, train, output=output, config=training, resume=True, activations=activations)
        evaluation = evaluate(recognizer, test, output=output / "evaluation", batch_size=training.side_by_side)
    return {
        "setting": setting,
        "variant": name,
        "seed": seed,
        "steps": training.epochs * -(-len(train) // training.batch_size),
        "parameters": sum(parameter.numel() for parameter in memory.parameters()),
        **by_turn(evaluation),
    }


def by_turn(evaluation: Evaluation) -> dict[str, list[float]]:
    """Arm -> accuracy at each turn."""
    turns = max(answer["turn"] for answer in evaluation.answers)
    found: dict[str, list[float]] = {}
    for arm in evaluation.run["arms"]:
        right: list[list[bool]] = [[] for _ in range(turns)]
        for answer in evaluation.answers:
            probabilities = answer["arms"][arm]
            right[answer["turn"] - 1].append(max(probabilities, key=probabilities.__getitem__) == answer["truth"])
        found[arm] = [round(sum(hits) / len(hits), 4) for hits in right]
    return found


def dialogues_of(setting: str, cache: Path) -> tuple[list[Dialogue], list[Dialogue]]:
    """The training and the test dialogues; their sound files are written unless they exist."""
    parts = []
    for number, split in enumerate(("train", "test" if setting == "final" else "dev")):
        manifest = cache / split / "manifest.jsonl"
        if not manifest.exists():
            write_wavs(list(make_dialogues(split, 0, COUNTS[split])), manifest.parent)
        dialogues = read_manifest(manifest)
        parts.append(deal_by_mood(dialogues, seed=number) if setting == "mood" else dialogues)
    return parts[0], parts[1]


def deal_by_mood(dialogues: Sequence[Dialogue], seed: int) -> list[Dialogue]:
    """As many dialogues of the same utterances, each with one prevailing emotion and a new voice at every turn."""
    rng = np.random.default_rng(seed)
    utterances = [utterance for dialogue in dialogues for utterance in dialogue.utterances]
    labels = np.array([EMOTIONS.index(str(utterance.emotion)) for utterance in utterances])
    shape = (len(dialogues), len(dialogues[0].utterances))
    mood = rng.integers(len(EMOTIONS), size=(len(dialogues), 1))
    other = (mood + rng.integers(1, len(EMOTIONS), size=shape)) % len(EMOTIONS)
    wanted = np.where(rng.random(shape) < MOOD, mood, other)
    dealt = np.empty(len(utterances), dtype=np.int64)
    for label in range(len(EMOTIONS)):
        places = np.flatnonzero(wanted.ravel() == label)
        dealt[places] = rng.choice(np.flatnonzero(labels == label), size=len(places))

    def named(turn: int, source: int, dialogue_id: str) -> Utterance:
        return replace(utterances[source], dialogue_id=dialogue_id, utterance_id=str(turn))

    return [
        Dialogue(f"mood-{n:05d}", tuple(named(turn, source, f"mood-{n:05d}") for turn, source in enumerate(row)))
        for n, row in enumerate(dealt.reshape(shape))
    ]


def voices_of(recognizer: EmotionRecognizer, dialogues: Sequence[Dialogue], activations: Path) -> Tensor:
    """The output of the memory's layer at the audio positions, (dialogues, turns, audio tokens, hidden_size)."""
    assert recognizer.memory is not None
    cached = CachedHost(recognizer, recognizer.memory, activations)
    rows = []
    for dialogue in dialogues:
        cached.keep(dialogue.utterances)
        prepared = cached.prepare(dialogue.utterances)
        assert prepared.audio_mask is not None
        hidden = prepared.inputs["hidden"]
        rows.append(hidden[prepared.audio_mask].view(len(hidden), -1, hidden.shape[-1]))
    return torch.stack(rows)


def table(results: list[dict[str, Any]], setting: str) -> Iterator[str]:
    """Markdown rows: mean and spread of the accuracies over seeds, the best first."""
    yield "| | parameters | seeds | accuracy | turns 5–10 | reset | swapped | other dialogues | shuffled |"
    yield "|---|---|---|---|---|---|---|---|---|"
    rows = []
    for name in dict.fromkeys(r["variant"] for r in results if r["setting"] == setting):
        runs = [r for r in results if r["setting"] == setting and r["variant"] == name]
        over = {
            key: [statistics.mean(r[key]) for r in runs]
            for key in ("own", "reset", "swapped", "other_dialogues", "shuffled")
        }
        late = [statistics.mean(r["own"][4:]) for r in runs]
        cells = [name, f"{runs[0]['parameters']:,}".replace(",", " "), str(len(runs)), _spread(over["own"])]
        cells += [_spread(late), *(_spread(over[key]) for key in ("reset", "swapped", "other_dialogues", "shuffled"))]
        rows.append((statistics.mean(over["own"]), cells))
    bare = [r["host_only"] for r in results if r["setting"] == setting]
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
    parser.add_argument("--cache", type=Path, default=Path(".cache/study"))
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
                print(setting, name, seed, f"{statistics.mean(result['own']):.3f}", flush=True)


if __name__ == "__main__":
    main()
