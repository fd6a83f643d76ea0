"""Train a memory and its control on MELD, evaluate them on the official test split, and write an HTML report.

pip install 'mal-adapter[train]'
python examples/train_meld.py MELD.Raw my-memory --model Qwen/Qwen2-Audio-7B-Instruct --layer 16

MELD.Raw is the unpacked release with the clips as .wav, .flac or .mp4. For several devices, use `accelerate launch`
instead of `python`.
"""

import argparse
from pathlib import Path

import torch
from accelerate import PartialState

from mal_adapter import MemoryConfig, attach_memory
from mal_adapter.ser import write_report
from mal_adapter.ser.corpora import read_corpus
from mal_adapter.ser.evaluation import evaluate
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
from mal_adapter.ser.training import TrainingConfig, train_memory

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("root", help="the folder with the CSV files and the clips")
parser.add_argument("output", type=Path)
parser.add_argument("--model", default="Qwen/Qwen2-Audio-7B-Instruct")
parser.add_argument("--layer", type=int, default=16)
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

state = PartialState(cpu=not torch.cuda.is_available())
corpus = read_corpus("meld", options.root)
if state.is_main_process:
    print(corpus.report)

model, processor = load_host(options.model)
control = options.output / "control"  # the same adapter without a past: what it gains is the read-out's
for update, output in (("none", control), ("titans", options.output)):
    torch.manual_seed(options.seed)
    # 1 038 training dialogues are few for a memory, so it is narrow and has dropout.
    config = MemoryConfig(memory_dim=128, num_heads=2, dropout=0.1, update=update)
    memory = attach_memory(model, options.layer, config=config)
    recognizer = EmotionRecognizer(model, processor, memory, corpus.labels)
    train_memory(
        recognizer,
        corpus.splits["train"],
        corpus.splits["dev"],
        output=output,
        config=TrainingConfig(epochs=options.epochs, class_weights="balanced", seed=options.seed),
        datasets=["declare-lab/MELD"],
    )
    if update == "none":
        memory.detach()

evaluation = evaluate(recognizer, corpus.splits["test"], output=options.output / "test", control=control)
if state.is_main_process:
    figures = write_report(options.output / "report", [evaluation])
    for arm, scores in figures["arms"].items():
        print(f"{arm:10} weighted F1 {scores['weighted_f1']:.3f}  accuracy {scores['wa']:.3f}")
    print(figures["verdict"])
