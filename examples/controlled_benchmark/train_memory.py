"""Train the memory of the shipped tiny host on synthetic dialogues, and measure it, as a user of the library would.

    pip install 'mal-adapter[train]'
    python examples/controlled_benchmark/train_memory.py my-memory                  # half an hour on one core
    python examples/controlled_benchmark/train_memory.py my-memory --seed 1 --corpus corpus

The command line gives the same memory from the same dialogues; the options of the training are in `settings.json`:

    mal-adapter train corpus/train/manifest.jsonl --config examples/controlled_benchmark/settings.json \\
        --model HOST --layer 1 --labels neutral,happy,angry,sad --prompt "How does the speaker feel?" --output my-memory

The test dialogues are those of `mal-adapter demo`: no setting was chosen by them.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from mal_adapter import MemoryConfig, attach_memory
from mal_adapter.demo import EMOTIONS, HOST_FOLDER, LAYER_IDX, PROMPT
from mal_adapter.demo.dialogues import make_dialogues, write_wavs
from mal_adapter.ser import write_report
from mal_adapter.ser.dialogue import Dialogue, read_manifest
from mal_adapter.ser.evaluation import evaluate
from mal_adapter.ser.evaluation.report import card_entry
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
from mal_adapter.ser.training import TrainingConfig, train_memory

SETTINGS = Path(__file__).with_name("settings.json")
DATASET = "parametric voices of mal_adapter.demo"


def main() -> None:
    options = parse_arguments()
    counts = {"train": options.train_dialogues, "dev": options.test_dialogues, "test": options.test_dialogues}
    splits = {split: speak(options.corpus / split, split, count) for split, count in counts.items()}

    settings = json.loads(options.config.read_text())
    memory_fields = settings.pop("memory")
    config = TrainingConfig.from_dict({**settings, "seed": options.seed})
    if options.epochs is not None:
        config = replace(config, epochs=options.epochs)

    model, processor = load_host(str(options.host), device="cpu")
    torch.manual_seed(options.seed)  # of the first weights
    memory = attach_memory(model, LAYER_IDX, config=MemoryConfig(**memory_fields))
    recognizer = EmotionRecognizer(model, processor, memory, EMOTIONS, PROMPT)
    train_memory(
        recognizer,
        splits["train"],
        output=options.output,
        config=config,
        resume=True,
        activations=options.corpus / "activations" if config.cache_activations else None,
        training_data=f"{len(splits['train'])} made dialogues of ten utterances; the voices are synthetic, so it is "
        "for the demo only.",
    )

    evaluations = options.output / "evaluations"
    for split in ("dev", "test"):
        evaluation = evaluate(recognizer, splits[split], output=evaluations / split, batch_size=16)
        figures = write_report(evaluations / split / "report", [evaluation])
        print(f"{split}: " + ", ".join(f"{arm} {scores['wa']:.3f}" for arm, scores in figures["arms"].items()))
        print(figures["verdict"])
        if split == "dev":
            metadata = memory.adapter.metadata
            memory.adapter.metadata = replace(metadata, evaluation=[card_entry(figures, DATASET, split)])
            memory.adapter.save_pretrained(options.output)


def speak(folder: Path, split: str, count: int) -> list[Dialogue]:
    """The first `count` dialogues of a split of seed 0 as WAV files with a manifest; made unless they are there."""
    manifest = folder / "manifest.jsonl"
    if not manifest.exists():
        return write_wavs(list(make_dialogues(split, seed=0, count=count)), folder)
    dialogues = read_manifest(manifest)
    if len(dialogues) != count:
        raise SystemExit(f"{manifest} has {len(dialogues)} dialogues, not {count}; choose another --corpus folder")
    return dialogues


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the adapter; a run that was stopped is resumed there")
    parser.add_argument("--corpus", type=Path, default=Path("corpus"), help="folder for WAV files and activations")
    parser.add_argument("--host", type=Path, default=HOST_FOLDER, help="the shipped one unless given")
    parser.add_argument("--config", type=Path, default=SETTINGS, help="JSON, as for mal-adapter train")
    parser.add_argument("--epochs", type=int, help="instead of the settings'")
    parser.add_argument("--seed", type=int, default=0, help="of first weights, order and dropout")
    parser.add_argument("--train-dialogues", type=int, default=3000)
    parser.add_argument("--test-dialogues", type=int, default=300, help="of the dev and of the test split")
    return parser.parse_args()


if __name__ == "__main__":
    main()
