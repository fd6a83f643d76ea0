"""Measure what a memory adds to a LoRA: train a LoRA alone and one beside a memory, and compare them by a paired test.

pip install 'mal-adapter[train]'
python examples/lora_and_memory.py train.jsonl dev.jsonl test.jsonl out --model Qwen/Qwen2-Audio-7B-Instruct --layer 16

The manifests are as in docs/train_your_own.md. The LoRA alone is trained on the same utterances, each in a dialogue of
its own. It has the same parameters, but its memory is always empty.
"""

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mal_adapter import MemoryConfig, attach_memory
from mal_adapter.errors import UninformativeDataWarning
from mal_adapter.ser import LabelSet, write_report
from mal_adapter.ser.dialogue import Dialogue, read_manifest
from mal_adapter.ser.evaluation import Evaluation, evaluate
from mal_adapter.ser.labels import emotions_that_occur
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
from mal_adapter.ser.training import TrainingConfig, train_memory

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("manifests", nargs=3, metavar="MANIFEST", help="for training, for choosing the epoch, for the test")
parser.add_argument("output", type=Path)
parser.add_argument("--model", default="Qwen/Qwen2-Audio-7B-Instruct")
parser.add_argument("--layer", type=int, default=16)
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--epochs", type=int, default=4)
options = parser.parse_args()

train, dev, test = (read_manifest(path) for path in options.manifests)
labels = LabelSet(emotions_that_occur(u.emotion for d in train for u in d.utterances))


def split_into_utterances(dialogues: Sequence[Dialogue]) -> list[Dialogue]:
    """Make a dialogue of each utterance."""
    names = {f"{u.dialogue_id}/{u.utterance_id}": u for dialogue in dialogues for u in dialogue.utterances}
    return [Dialogue(name, (replace(u, dialogue_id=name),)) for name, u in names.items()]


def train_and_evaluate(name: str, train: list[Dialogue], dev: list[Dialogue], arms: list[str]) -> Evaluation:
    """Train a fresh copy of the host, then evaluate it on the test dialogues."""
    model, processor = load_host(options.model)
    torch.manual_seed(0)
    config = MemoryConfig(memory_dim=128, num_heads=2, dropout=0.1)
    recognizer = EmotionRecognizer(model, processor, attach_memory(model, options.layer, config=config), labels)
    utterances = sum(len(dialogue.utterances) for dialogue in train)
    # about as many utterances per step, whether a dialogue has many or one
    batch_size = max(1, 80 * len(train) // utterances)
    settings = TrainingConfig(epochs=options.epochs, lora_rank=options.rank, batch_size=batch_size)
    train_memory(recognizer, train, dev, output=options.output / name, config=settings)
    return evaluate(recognizer, test, output=options.output / f"{name}-test", arms=arms)


with warnings.catch_warnings():  # alone, nothing has a past, on purpose
    warnings.simplefilter("ignore", UninformativeDataWarning)
    alone = train_and_evaluate("lora", split_into_utterances(train), split_into_utterances(dev), ["reset"])
beside = train_and_evaluate("lora-and-memory", train, dev, ["host_only", "own", "reset", "swapped", "other_dialogues"])
figures = write_report(options.output / "report", [beside], against=[alone])
print(f"LoRA alone          WA {figures['against']['lora-test']['wa']:.3f}")
print(f"LoRA and memory     WA {figures['arms']['own']['wa']:.3f}")
(test_of_both,) = (pair["wa"] for pair in figures["compared"] if pair["first"] == "lora-test")
print(f"difference {test_of_both['difference']:+.3f}, p = {test_of_both['p_value']:.4f} over dialogues")
print(f"report: {options.output / 'report' / 'report.html'}")
