"""Make the shipped host, and its memory adapter, again from seeds.

    python -m mal_adapter.demo.build --output DIR                  # host, then adapter
    python -m mal_adapter.demo.build --output DIR --stage host
    python -m mal_adapter.demo.build --output DIR --stage adapter  # needs DIR/host

Nothing is downloaded. Floating-point sums differ between machines, so the weights are reproduced to their figures, not
to the last bit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mal_adapter.demo.features import load_features
from mal_adapter.demo.host import save_host
from mal_adapter.demo.host_training import train_host

__all__ = ["build_adapter", "build_host", "main"]

HOST_DIALOGUES = 4000  # 40 000 utterances
HOST_STEPS = 2500


def build_host(
    output: Path,
    cache: Path,
    *,
    seed: int = 0,
    dialogues: int = HOST_DIALOGUES,
    steps: int = HOST_STEPS,
    workers: int = 2,
) -> Path:
    """Speak the host's training data, train the host, save it in `output/host`; return that folder."""
    features = load_features("host", seed, dialogues, cache, workers=workers)
    model, processor = train_host(features, seed=seed, steps=steps)
    folder = output / "host"
    save_host(model, processor, folder)
    return folder


def build_adapter(output: Path, cache: Path, *, seed: int = 0, workers: int = 2) -> Path:
    """Train the memory adapter on the host in `output/host`, save it in `output/adapter`; return that folder."""
    from mal_adapter.demo.training import train_adapter

    folder = output / "adapter"
    accuracies = train_adapter(output / "host", folder, cache=cache, seed=seed, workers=workers)
    print("state audit:", ", ".join(f"{name} {accuracy:.3f}" for name, accuracy in accuracies.items()))
    return folder


def main(arguments: list[str] | None = None) -> None:
    """Run the chosen stages and print where the result is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for host/ and adapter/")
    parser.add_argument("--stage", choices=("all", "host", "adapter"), default="all")
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/demo"), help="where features and activations are kept"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dialogues", type=int, default=HOST_DIALOGUES, help="dialogues the host is trained on")
    parser.add_argument("--steps", type=int, default=HOST_STEPS, help="training steps of the host")
    parser.add_argument("--workers", type=int, default=2, help="processes that make audio; also torch's threads")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.workers)
    if options.stage in ("all", "host"):
        folder = build_host(
            options.output,
            options.cache,
            seed=options.seed,
            dialogues=options.dialogues,
            steps=options.steps,
            workers=options.workers,
        )
        print(f"host: {folder}")
    if options.stage in ("all", "adapter"):
        print(f"adapter: {build_adapter(options.output, options.cache, seed=options.seed, workers=options.workers)}")


if __name__ == "__main__":
    main()
