"""All speed figures beside their targets, as ratios in one run.

pip install -c constraints.txt -e '.[bench]'
python -m tests.benchmarks                      # about ten minutes, one thread
python -m tests.benchmarks --only overhead --output figures.json
"""

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tests.benchmarks import exactness, in_a_host, training, write_and_read
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
    "saving": in_a_host.saving,
}


def machine(device: str) -> str:
    """The machine and versions of the measurement."""
    if device != "cpu":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    simd = torch.backends.cpu.get_cpu_capability()
    return f"{model}, {simd}, one thread, torch {torch.__version__}, Python {platform.python_version()}"


def main() -> None:
    """Print the table and, with --output, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(MEASURES), choices=list(MEASURES))
    parser.add_argument("--device", default="cpu", help="cpu, or cuda, which measures time with events")
    parser.add_argument("--seconds", type=float, default=4.0, help="per comparison; at least five rounds")
    parser.add_argument("--output", type=Path, help="JSON of all rows")
    options = parser.parse_args()
    settle()
    torch.manual_seed(0)
    if set(options.only) & {"same_semantics", "fastest_mode", "peak_memory"}:
        write_and_read.check(options.device)
    print(f"{machine(options.device)}\n")
    print("| measure | size | figure | target | | ms: median (quartiles), ours first |")
    print("|---|---|---|---|---|---|", flush=True)
    rows = []
    for name in options.only:
        for row in MEASURES[name](options.device, options.seconds):
            print(row.line(), flush=True)
            rows.append({"part": name, **row.as_json()})
    missed = [f"{row['measure']}, {row['size']}" for row in rows if row["met"] is False]
    print(f"\n{len(missed)} of {sum(row['met'] is not None for row in rows)} targets missed", *missed, sep="\n- ")
    if options.output:
        options.output.write_text(json.dumps({"machine": machine(options.device), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
