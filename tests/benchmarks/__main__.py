"""All speed figures beside their targets, as ratios in one run.

pip install -c constraints.txt -e '.[bench]'
python -m tests.benchmarks                      # about ten minutes, one thread
python -m tests.benchmarks --only overhead --json figures.json

On a GPU, another table: a 7B host with a memory, four minutes. --scale tiny does the same on a small host.

python -m tests.benchmarks --device cuda --json figures.json --markdown figures.md
python -m tests.benchmarks --scale tiny         # on the CPU
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tests.benchmarks import evaluating, exactness, in_a_host, training, turns, write_and_read
from tests.benchmarks.gpu import run as on_a_gpu
from tests.benchmarks.gpu.world import SCALES
from tests.benchmarks.rows import Row
from tests.benchmarks.timing import settle

MEASURES: dict[str, Callable[[str, float], Iterator[Row]]] = {
    "same_semantics": write_and_read.same_semantics,
    "fastest_mode": write_and_read.fastest_mode,
    "efficiency": write_and_read.efficiency,
    "peak_memory": write_and_read.peak_memory,
    "overhead": in_a_host.overhead,
    "history": in_a_host.history,
    "inactive_hooks": in_a_host.inactive_hooks,
    "decode_step": in_a_host.decode_step,
    "dialogue_length": in_a_host.dialogue_length,
    "operations": in_a_host.operations,
    "exactness": exactness.exactness,
    "training": training.training_throughput,
    "evaluation": evaluating.evaluation_time,
    "saving": in_a_host.saving,
    "turns": turns.turns_of_calls,
}


def machine() -> str:
    """The machine and versions of the measurement."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    simd = torch.backends.cpu.get_cpu_capability()
    return f"{model}, {simd}, one thread, torch {torch.__version__}, Python {platform.python_version()}"


def options_of(arguments: list[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="SECTION", help=f"{', '.join(MEASURES)}; on a GPU or with "
                        f"--scale: {', '.join(on_a_gpu.SECTIONS)}")  # fmt: skip
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--scale", choices=list(SCALES), help="the GPU's table, with this host; 7b on a GPU")
    parser.add_argument("--seconds", type=float, default=4.0, help="on the CPU, per comparison; at least five rounds")
    parser.add_argument("--budget", type=float, default=205.0, help="on a GPU, seconds in all")
    parser.add_argument("--json", dest="output", type=Path, help="a file for all numbers")
    parser.add_argument("--markdown", type=Path, help="a file for the GPU's table")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and options.scale is None:
        options.scale = "7b"
    known = MEASURES if options.scale is None else on_a_gpu.SECTIONS
    if unknown := [name for name in options.only or () if name not in known]:
        parser.error(f"--only {' '.join(unknown)}: the sections are {', '.join(known)}")
    if options.markdown is not None and options.scale is None:
        parser.error("--markdown is for the GPU's table: --device cuda, or --scale tiny")
    return options


def main() -> int:
    """Print the table and, with --json, write it."""
    options = options_of(sys.argv[1:])
    if options.scale is not None:
        return on_a_gpu.run(options)
    settle()
    torch.manual_seed(0)
    names = options.only or list(MEASURES)
    if set(names) & {"same_semantics", "fastest_mode", "peak_memory"}:
        write_and_read.check("cpu")
    print(f"{machine()}\n")
    print("| measure | size | figure | target | | ms: median (quartiles), ours first |")
    print("|---|---|---|---|---|---|", flush=True)
    rows = []
    for name in names:
        for row in MEASURES[name]("cpu", options.seconds):
            print(row.line(), flush=True)
            rows.append({"part": name, **row.as_json()})
    missed = [f"{row['measure']}, {row['size']}" for row in rows if row["met"] is False]
    print(f"\n{len(missed)} of {sum(row['met'] is not None for row in rows)} targets missed", *missed, sep="\n- ")
    if options.output:
        options.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
