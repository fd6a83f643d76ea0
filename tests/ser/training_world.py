"""A small training run that tests can repeat many times: the demo's host, a few short dialogues, a narrow memory.

It is not in a test file, so that other processes can import it.
"""

import dataclasses
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from mal_adapter import MemoryConfig, attach_memory
from mal_adapter.demo import EMOTIONS, HOST_FOLDER, LAYER_IDX, PROMPT
from mal_adapter.demo.dialogues import make_dialogue, write_wavs
from mal_adapter.ser.dialogue import Dialogue
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
from mal_adapter.ser.training import TrainingConfig, train_memory

#: Turns of the dialogues; of different lengths, so that they end one after the other.
LENGTHS = (4, 2, 3, 5, 3, 2)
FAST = TrainingConfig(
    epochs=2, batch_size=2, side_by_side=2, window=3, learning_rate=1e-2, checkpoint_every=1, patience=None
)


def make_dialogues(folder: Path, lengths: Sequence[int] = LENGTHS, split: str = "train") -> list[Dialogue]:
    return write_wavs([make_dialogue(split, 7, n, turns) for n, turns in enumerate(lengths)], folder)


def make_recognizer(
    *,
    dropout: float = 0.0,
    seed: int = 0,
    random: bool = False,
    labels: Sequence[str] = EMOTIONS,
    prompt: str = PROMPT,
    width: int = 16,
) -> EmotionRecognizer:
    """A recogniser with a fresh memory, or with one whose `random` parameters change the scores."""
    model, processor = load_host(str(HOST_FOLDER))
    torch.manual_seed(seed)
    config = MemoryConfig(hidden_size=96, memory_dim=width, num_heads=2, chunk_size=8, dropout=dropout)
    memory = attach_memory(model, LAYER_IDX, config=config)
    if random:
        with torch.no_grad():
            for parameter in memory.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return EmotionRecognizer(model, processor, memory, labels, prompt)


def parameters_of(recognizer: EmotionRecognizer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in recognizer.memory.adapter.named_parameters()}


def run(output: Path, train: Sequence[Dialogue], dev: Sequence[Dialogue] = (), *, resume=False, dropout=0.2, **changes):
    """Run once, from the same initial weights each time; return recogniser and report."""
    AcceleratorState._reset_state()  # accelerate refuses a second precision in one process
    # Each process has other initial weights, as without a seed; those of the first process are used.
    recognizer = make_recognizer(dropout=dropout, seed=1 + int(os.environ.get("RANK", "0")))
    config = dataclasses.replace(FAST, **changes)
    return recognizer, train_memory(recognizer, train, dev, output=output, config=config, resume=resume)


def run_until_killed(output: Path, train: Sequence[Dialogue], dev: Sequence[Dialogue], killed_at: int, changes) -> None:
    """Resume, and kill the process by SIGKILL at the `killed_at`-th call of a function that saving or a step uses."""
    import mal_adapter.serialization.atomic

    calls = 0

    def kill_at(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    # Before a file is flushed, before it is renamed, before a gradient, and in the middle of a step.
    mal_adapter.serialization.atomic.os.fsync = kill_at(os.fsync)
    mal_adapter.serialization.atomic.os.replace = kill_at(os.replace)
    torch.optim.AdamW.step = kill_at(torch.optim.AdamW.step)
    torch.Tensor.backward = kill_at(torch.Tensor.backward)
    run(output, train, dev, resume=True, **changes)
