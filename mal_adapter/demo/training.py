"""Train the demo's memory adapter: dialogues in order, on the frozen host's cached activations.

Up to the hooked layer the host knows no dialogue, so what leaves that layer is computed once per utterance. In training
the memory reads and writes there turn by turn, and gradients run back through the whole dialogue; the layers above then
answer all turns in one batch, since what they say is never written.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from mal_adapter import MemoryAdapter, MemoryConfig, attach_memory
from mal_adapter.demo import EMOTIONS, LAYER_IDX, PROMPT
from mal_adapter.demo.activations import Activations, HostTail, cache_activations
from mal_adapter.demo.features import load_features
from mal_adapter.demo.host import load_host

DIALOGUES = 3000
STEPS = 2500
BATCH = 32
LEARNING_RATE = 3e-3


def demo_config(hidden_size: int) -> MemoryConfig:
    """The sizes of the demo's memory."""
    return MemoryConfig(hidden_size=hidden_size, memory_dim=64, num_heads=1, depth=1, chunk_size=64, dropout=0.1)


def train_adapter(
    host_folder: Path, output: Path, *, cache: Path, seed: int = 0, workers: int = 2, steps: int = STEPS
) -> None:
    """Train an adapter for the host in `host_folder` and save it in `output`."""
    model, processor = load_host(host_folder)
    tail = HostTail(model, processor)
    features = load_features("train", seed, DIALOGUES, cache, workers=workers)
    activations = cache_activations(model, processor, features, cache / "activations")
    torch.manual_seed(seed)
    memory = attach_memory(model, LAYER_IDX, config=demo_config(model.config.text_config.hidden_size))
    fit(memory.adapter, activations, tail, steps=steps, seed=seed)
    memory.adapter.card = memory.adapter.card.with_task(EMOTIONS, PROMPT)
    memory.adapter.save_pretrained(output)
    memory.detach()


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


def answer_dialogues(adapter: MemoryAdapter, hidden: Tensor, audio: slice, tail: HostTail) -> Tensor:
    """The host's label logits, (batch, turns, labels), for dialogues heard with the memory from their start.

    Args:
        hidden: what leaves the hooked layer, (batch, turns, seq_len, hidden_size).
        audio: the audio positions in seq_len.
    """
    state = adapter.initial_state(len(hidden))
    heard = []
    for turn in hidden.unbind(1):
        residual = adapter.read(state, turn[:, audio])
        heard.append(torch.cat((turn[:, : audio.start], turn[:, audio] + residual, turn[:, audio.stop :]), dim=1))
        state = adapter.write(state, turn[:, audio])
    logits = tail(torch.stack(heard, dim=1).flatten(0, 1))
    return logits.view(*hidden.shape[:2], -1)


@torch.no_grad()
def accuracy_by_turn(adapter: MemoryAdapter, activations: Activations, tail: HostTail) -> Tensor:
    """Accuracy at each turn, (turns,), on the activations of held-out dialogues."""
    right = []
    for start in range(0, len(activations), 50):
        hidden, labels = activations.batch(list(range(start, min(start + 50, len(activations)))))
        right.append(answer_dialogues(adapter, hidden, activations.audio, tail).argmax(-1) == labels)
    return torch.cat(right).float().mean(0)
