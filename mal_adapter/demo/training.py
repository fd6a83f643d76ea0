"""Train the demo's memory adapter: dialogues in order, on the frozen host's cached activations.

Up to the hooked layer the host knows no dialogue, so what leaves that layer is computed once per utterance. In training
the memory reads and writes there turn by turn, and gradients run back through the whole dialogue; the layers above then
answer all turns in one batch, since what they say is never written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from mal_adapter import MemoryAdapter, MemoryConfig, MemoryState, attach_memory
from mal_adapter.card import AdapterCard
from mal_adapter.demo import EMOTIONS, LAYER_IDX, PROMPT
from mal_adapter.demo.activations import Activations, HostTail, cache_activations
from mal_adapter.demo.features import load_features
from mal_adapter.demo.host import load_host

__all__ = ["STEPS", "answer_dialogues", "audit", "demo_config", "fit", "train_adapter"]

DIALOGUES = 3000
DEV_DIALOGUES = 300
STEPS = 2000
BATCH = 16
LEARNING_RATE = 3e-3


def demo_config(hidden_size: int) -> MemoryConfig:
    """The sizes of the demo's memory."""
    return MemoryConfig(hidden_size=hidden_size, memory_dim=128, num_heads=2, depth=2, dropout=0.1)


def train_adapter(
    host_folder: Path, output: Path, *, cache: Path, seed: int = 0, workers: int = 2, steps: int = STEPS
) -> dict[str, float]:
    """Train an adapter for the host in `host_folder` and save it in `output`.

    Returns:
        The accuracies of the state audit on development dialogues.
    """
    model, processor = load_host(host_folder)
    tail = HostTail(model, processor)
    features = load_features("train", seed, DIALOGUES, cache, workers=workers)
    activations = cache_activations(model, processor, features, cache / "activations")
    torch.manual_seed(seed)
    memory = attach_memory(model, LAYER_IDX, config=demo_config(model.config.text_config.hidden_size))
    fit(memory.adapter, activations, tail, steps=steps, seed=seed)
    memory.detach()
    features = load_features("dev", seed, DEV_DIALOGUES, cache, workers=workers)
    held_out = cache_activations(model, processor, features, cache / "activations-dev")
    accuracies = {name: float(np.mean(by_turn)) for name, by_turn in audit(memory.adapter, held_out, tail).items()}
    memory.adapter.card = described(memory.adapter.card, accuracies["right"], accuracies["bare"])
    memory.adapter.save_pretrained(output)
    return accuracies


def described(card: AdapterCard, accuracy: float, host_accuracy: float) -> AdapterCard:
    """The card of the demo's adapter, with its accuracy on development dialogues and the bare host's."""
    result = {
        "dataset_name": "parametric voices of mal_adapter.demo",
        "dataset_type": "mal_adapter-demo",
        "dataset_split": "dev",
        "metrics": {"accuracy": round(accuracy, 3)},
        "host_metrics": {"accuracy": round(host_accuracy, 3)},
    }
    training_data = (
        f"{DIALOGUES} made dialogues of ten utterances; the voices are synthetic, so it is for the demo only."
    )
    return dataclasses.replace(card.with_task(EMOTIONS, PROMPT), training_data=training_data, evaluation=[result])


def fit(
    adapter: MemoryAdapter,
    activations: Activations,
    tail: HostTail,
    *,
    steps: int = STEPS,
    batch_size: int = BATCH,
    learning_rate: float = LEARNING_RATE,
    weight_decay: float = 0.01,
    seed: int = 0,
) -> None:
    """Train `adapter` in place on whole dialogues with AdamW and a one-cycle learning rate; leaves it in eval mode."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    adapter.train()
    progress = tqdm(range(steps), desc="training the memory", unit="step", mininterval=2)
    mean_loss = 1.0
    for _ in progress:
        hidden, labels = activations.batch(rng.integers(len(activations), size=batch_size))
        logits = answer_dialogues(adapter, hidden, activations.audio, tail)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean_loss += 0.02 * (loss.item() - mean_loss)
        progress.set_postfix(loss=f"{mean_loss:.3f}", refresh=False)
    adapter.eval()


def answer_dialogues(
    adapter: MemoryAdapter,
    hidden: Float[Tensor, "batch turns seq_len hidden_size"],
    audio: slice,
    tail: HostTail,
    recall: Callable[[MemoryState], MemoryState] = lambda state: state,
) -> Float[Tensor, "batch turns labels"]:
    """The host's label logits for dialogues heard with the memory from their start.

    Args:
        hidden: what leaves the hooked layer.
        audio: the audio positions in seq_len.
        recall: what is read instead of the right state, for the state audit.
    """
    state = adapter.initial_state(len(hidden))
    heard = []
    for turn in hidden.unbind(1):
        understood = turn[:, audio] + adapter.read(recall(state), turn[:, audio])
        heard.append(torch.cat((turn[:, : audio.start], understood, turn[:, audio.stop :]), dim=1))
        state = adapter.write(state, understood)
    logits = tail(torch.stack(heard, dim=1).flatten(0, 1))
    return logits.view(*hidden.shape[:2], -1)


@torch.no_grad()
def audit(adapter: MemoryAdapter, activations: Activations, tail: HostTail) -> dict[str, list[float]]:
    """Accuracy by turn on held-out dialogues with the right state and with wrong ones.

    A memory is real only if the right state beats all that come from another past.

    Returns:
        "right"; "bare", which is the host whose memory is written and never read; "reset" (every utterance reads an
        empty memory); "swapped" (it reads what another dialogue has written by that turn); "mixed" (the utterances
        before it came from other dialogues, so that nothing tells of its speaker); "shuffled" (the utterances of a
        dialogue in random order).
    """
    recalls: dict[str, Callable[[MemoryState], MemoryState]] = {
        "right": lambda state: state,
        "reset": lambda state: adapter.initial_state(state.batch_size),
        "swapped": lambda state: state.rows(torch.arange(state.batch_size).roll(1)),
    }
    random = torch.Generator().manual_seed(0)
    right: dict[str, list[Tensor]] = {name: [] for name in (*recalls, "bare", "mixed", "shuffled")}

    def hear(name: str, hidden: Tensor, labels: Tensor, recall: Callable[[MemoryState], MemoryState]) -> None:
        answers = answer_dialogues(adapter, hidden, activations.audio, tail, recall).argmax(-1)
        right[name].append(answers == labels)

    for rows in torch.split(torch.arange(len(activations)), 50):
        hidden, labels = activations.batch(rows.tolist())
        for name, recall in recalls.items():
            hear(name, hidden, labels, recall)
        right["bare"].append(tail(hidden.flatten(0, 1)).argmax(-1).view_as(labels) == labels)
        dialogues, turns = labels.shape
        row, turn = torch.arange(dialogues)[:, None], torch.arange(turns)[None]
        mixed = (row + turn) % dialogues
        hear("mixed", hidden[mixed, turn], labels[mixed, turn], recalls["right"])
        order = torch.rand(dialogues, turns, generator=random).argsort(-1)
        hear("shuffled", hidden[row, order], labels[row, order], recalls["right"])
    return {name: torch.cat(rows).float().mean(0).tolist() for name, rows in right.items()}
