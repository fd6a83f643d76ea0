"""The sections in their order, each with its time; what fails or runs out of time leaves the others alone."""

import argparse
import dataclasses
import datetime
import faulthandler
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.benchmarks.gpu import warm
from tests.benchmarks.gpu.adapter_rows import adapter, launches
from tests.benchmarks.gpu.clock import Clock, clock_of
from tests.benchmarks.gpu.compiled_rows import compiled
from tests.benchmarks.gpu.figures import HEADER, Figure
from tests.benchmarks.gpu.host_rows import attaching, decode, prefill, waits
from tests.benchmarks.gpu.peer_rows import against_titans_pytorch
from tests.benchmarks.gpu.training_rows import training
from tests.benchmarks.gpu.world import SCALES, Budget, OutOfTimeError, World
from tests.benchmarks.gpu.writes import precision, writes

__all__ = ["SECTIONS", "Section", "machine", "measure", "run"]

COMPILING_S = 45.0


class Section(NamedTuple):
    """A part of the table, and how many seconds it may take."""

    measure: Callable[[World, Budget], Iterator[Figure]]
    seconds: float


# What the targets are about comes first, so that a slow machine leaves out the rest; launches come last, since CUDA's
# profiler slows what runs after it, and have their time reserved.
SECTIONS = {
    "attach": Section(attaching, 60),
    "waits": Section(waits, 10),
    "prefill": Section(prefill, 50),
    "adapter": Section(adapter, 12),
    "writes": Section(writes, 25),
    "precision": Section(precision, 12),
    "training": Section(training, 25),
    "compiled": Section(compiled, 20),
    "peers": Section(against_titans_pytorch, 45),
    "decode": Section(decode, 20),
    "launches": Section(launches, 12),
}


class Report:
    """What was measured; written after each section, so that a later crash loses nothing.

    Args:
        json_path: For all numbers; None for no file.
        markdown_path: For the table; None for no file.
    """

    def __init__(self, about: dict[str, Any], json_path: Path | None, markdown_path: Path | None) -> None:
        self.about = about
        self.figures: list[dict[str, Any]] = []
        self.lines: list[str] = []
        self.problems: dict[str, str] = {}
        self._json, self._markdown = json_path, markdown_path

    def add(self, section: str, figure: Figure) -> None:
        """Print and keep a line."""
        self.figures.append({"section": section, **figure.as_json()})
        self.lines.append(figure.line())
        print(figure.line(), flush=True)

    def problem(self, section: str, message: str) -> None:
        """Print and keep why lines are missing."""
        self.problems[section] = message
        line = f"| **{section}** | {' '.join(message.split()).replace('|', '/')} | | | | | |"
        self.lines.append(line)
        print(line, flush=True)

    @property
    def summary(self) -> str:
        """How many targets are missed, and which."""
        missed = [f for f in self.figures if f["met"] is False]
        first = f"{len(missed)} of {sum(f['met'] is not None for f in self.figures)} targets MISSED"
        return "\n- ".join([first, *(f"{f['measure']}, {f['size']}" for f in missed)])

    def write(self) -> None:
        """Write the files."""
        if self._json is not None:
            everything = {**self.about, "problems": self.problems, "figures": self.figures}
            self._json.write_text(json.dumps(everything, indent=1, ensure_ascii=False) + "\n")
        if self._markdown is not None:
            title = ", ".join(f"{name} {value}" for name, value in self.about.items() if value)
            self._markdown.write_text("\n".join([f"Measured: {title}.", "", HEADER, *self.lines, "", self.summary, ""]))


def measure(world: World, names: list[str], report: Report, seconds: float) -> None:
    """All these sections within `seconds`."""
    whole = Budget(seconds)
    compiling = warm.start(world.scale, world.clock)
    for name in names:
        if compiling and name != "attach":  # attaching only makes the host; all others are timed alone
            if wrong := warm.wait(compiling, min(COMPILING_S, whole.left)):
                report.problem("compiling", "; ".join(wrong))
            compiling = []
        began = time.perf_counter()
        reserved = SECTIONS[names[-1]].seconds if name != names[-1] else 0
        budget = Budget(min(SECTIONS[name].seconds, whole.left - reserved))
        try:
            budget.check("all of it")
            for figure in SECTIONS[name].measure(world, budget):
                if figure.is_time and not world.scale.real:
                    figure = dataclasses.replace(figure, before="", target=None)
                report.add(name, figure)
        except OutOfTimeError as left_out:
            report.problem(name, f"out of time after {time.perf_counter() - began:.0f} s, left out from: {left_out}")
        except Exception as error:
            traceback.print_exc()
            report.problem(name, f"failed: {type(error).__name__}: {error}"[:300])
        world.clock.free()
        report.write()
    warm.wait(compiling, 0)


def machine(clock: Clock) -> dict[str, Any]:
    """The device, the versions and the commit of the measurement."""
    on_gpu = clock.cuda
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "titans-pytorch": _version("titans-pytorch"),
        "python": platform.python_version(),
        "commit": os.environ.get("COMMIT") or _output("git", "rev-parse", "--short=12", "HEAD"),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def run(options: argparse.Namespace) -> int:
    """Print the table. Returns 1 if a section failed; missed targets are no failure."""
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"--device cuda: torch {torch.__version__} finds no GPU; try --scale tiny on the CPU", file=sys.stderr)
        return 2
    # A kernel that hangs can't be interrupted; what was measured is written by then.
    faulthandler.dump_traceback_later(options.budget + 10, exit=True)
    torch.manual_seed(0)
    clock = clock_of(options.device)
    report = Report(machine(clock), options.output, options.markdown)
    print(", ".join(f"{name} {value}" for name, value in report.about.items() if value), HEADER, sep="\n\n", flush=True)
    began = time.perf_counter()
    measure(World(clock, SCALES[options.scale]), options.only or list(SECTIONS), report, options.budget)
    report.write()
    print(f"\n{report.summary}\n\n{time.perf_counter() - began:.0f} s")
    faulthandler.cancel_dump_traceback_later()
    return int(any("failed:" in message for message in report.problems.values()))
