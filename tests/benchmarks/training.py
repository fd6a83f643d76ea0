"""Utterances per second of the training loop, on the demo's host and dialogues."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator

from mal_adapter import attach_memory
from mal_adapter.demo import EMOTIONS, HOST_FOLDER, LAYER_IDX, PROMPT
from mal_adapter.demo.dialogues import make_dialogue, write_wavs
from mal_adapter.ser.dialogue import Dialogue
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
from mal_adapter.ser.training import TrainingConfig
from mal_adapter.ser.training.cached_host import CachedHost
from mal_adapter.ser.training.step import Stepper
from mal_adapter.ser.training.trainable import Trainable
from tests.benchmarks.rows import Row
from tests.benchmarks.timing import interleaved

DIALOGUES, TURNS = 8, 10


def training_throughput(device: str, seconds: float) -> Iterator[Row]:
    """The time of a step on eight dialogues side by side, with the host and from cached activations; and the time in
    which the host alone processes and scores the same."""
    with tempfile.TemporaryDirectory() as folder:
        dialogues = write_wavs([make_dialogue("train", 7, n, TURNS) for n in range(DIALOGUES)], Path(folder, "wavs"))
        recognizer = _recognizer(device)
        cached = CachedHost(recognizer, recognizer.memory, Path(folder, "activations"))
        for dialogue in dialogues:
            assert not cached.keep(dialogue.utterances)
        whole, short = (_step(recognizer, host, dialogues) for host in (None, cached))
        alone = recognizer.without_memory()
        times = interleaved(
            whole,
            short,
            lambda: list(alone.recognize_many(dialogues, DIALOGUES)),
            seconds=2 * seconds,
            device=device,
        )
    rates = [1000 * DIALOGUES * TURNS / t.median for t in times]
    size = f"{DIALOGUES} dialogues of {TURNS} turns, tiny Qwen2-Audio"
    yield Row("training, utterances per second", size, rates[0], times=(times[0],))
    yield Row("training from cached activations / with the host", size, rates[1] / rates[0], times=(times[1], times[0]))
    name = "training / scoring without a memory, utterances per second"
    yield Row(name, size, rates[0] / rates[2], times=(times[0], times[2]))


def _recognizer(device: str) -> EmotionRecognizer:
    model, processor = load_host(str(HOST_FOLDER))
    return EmotionRecognizer(model, processor, attach_memory(model.to(device), LAYER_IDX), EMOTIONS, PROMPT)


def _step(recognizer: EmotionRecognizer, cached: CachedHost | None, dialogues: list[Dialogue]) -> Callable[[], object]:
    config = TrainingConfig(side_by_side=DIALOGUES, batch_size=DIALOGUES)
    trainable = Trainable(recognizer.model, recognizer.memory)
    here = Accelerator(cpu=next(recognizer.model.parameters()).device.type == "cpu")
    stepper = Stepper(cached or recognizer, recognizer.memory, trainable, dialogues, config, here, 1000)

    def run() -> object:
        with trainable.frozen(), torch.enable_grad():
            return stepper.step(dialogues, {})

    return run
