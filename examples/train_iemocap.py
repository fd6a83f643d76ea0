"""Train five memories and their controls on IEMOCAP, each without one session; test each on it, and write one report.

pip install 'mal-adapter[train]'
python examples/train_iemocap.py IEMOCAP_full_release my-memory --model Qwen/Qwen2-Audio-7B-Instruct --layer 16

If it was interrupted, run it again: finished folds are loaded, an unfinished one is resumed.
"""

import argparse
from pathlib import Path

import torch

from mal_adapter import MemoryAdapter, MemoryConfig, attach_memory
from mal_adapter.ser import write_report
from mal_adapter.ser.corpora import read_corpus
from mal_adapter.ser.evaluation import evaluate
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
from mal_adapter.ser.training import TrainingConfig, train_memory

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("root", help="the folder with Session1 … Session5")
parser.add_argument("output", type=Path)
parser.add_argument("--model", default="Qwen/Qwen2-Audio-7B-Instruct")
parser.add_argument("--layer", type=int, default=16)
parser.add_argument("--epochs", type=int, default=8)
options = parser.parse_args()

corpus = read_corpus("iemocap", options.root)  # four classes, happy and excited as one: 5 531 utterances
print(corpus.report)
model, processor = load_host(options.model)

sessions, evaluations = list(corpus.splits), []
for number, (held_out, rest, test) in enumerate(corpus.folds()):
    # The test session must not choose the epoch, nor may speakers of the training, so the next session does.
    dev = corpus.splits[sessions[(sessions.index(held_out) + 1) % len(sessions)]]
    train = [dialogue for dialogue in rest if dialogue not in dev]
    control = options.output / held_out / "control"  # the same adapter without a past
    for update, output in (("none", control), ("titans", options.output / held_out)):
        if (output / "config.json").exists():
            memory = attach_memory(model, adapter=MemoryAdapter.from_pretrained(output))
        else:
            torch.manual_seed(number)
            config = MemoryConfig(memory_dim=128, num_heads=2, dropout=0.2, update=update)
            memory = attach_memory(model, options.layer, config=config)
        with memory:
            recognizer = EmotionRecognizer(model, processor, memory, corpus.labels)
            if not (output / "config.json").exists():
                train_memory(
                    recognizer,
                    train,
                    dev,
                    output=output,
                    config=TrainingConfig(epochs=options.epochs, batch_size=4, seed=number),
                    resume=True,
                )
            if update == "titans":
                evaluations.append(evaluate(recognizer, test, output=output / "test", control=control))

figures = write_report(options.output / "report", evaluations)
for arm, scores in figures["arms"].items():
    print(f"{arm:10} WA {scores['wa']:.3f}  UA {scores['ua']:.3f}")
print(figures["verdict"])
