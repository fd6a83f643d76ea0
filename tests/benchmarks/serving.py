"""Requests per second of `mal-adapter serve` on the package's host: 16 callers against one at a time, in one run.

python -m tests.benchmarks.serving                 # a minute; two server processes, the clients in this one
python -m tests.benchmarks.serving --seconds 2 --rounds 3 --batch 16
"""

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mal_adapter.demo.dialogues import make_dialogues, write_wavs

CALLERS = 16


@contextmanager
def server(*options: str) -> Iterator[tuple[int, int]]:
    """A server process with one thread per operation. Yields its process id and port."""
    command = [sys.executable, "-m", "mal_adapter.cli", "serve", "--port", "0", "--json", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True)
    try:
        assert process.stdout is not None
        lines = []
        while not lines or lines[-1] != "}\n":
            lines.append(process.stdout.readline())
            assert lines[-1], "the server has ended"
        yield process.pid, int(json.loads("".join(lines))["url"].rpartition(":")[2])
    finally:
        process.terminate()
        process.wait()


def cpu_s(process_id: int) -> float:
    """The CPU time of a process; Linux only."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Rate(NamedTuple):
    per_s: float
    cpu_ms: float
    """Of the server, per answer."""


def rate(server: tuple[int, int], callers: int, bodies: list[bytes], seconds: float) -> Rate:
    """Answers per second. Each caller has a connection and a session, and sends its next utterance after an answer."""
    process_id, port = server
    counts, until_s = [0] * callers, time.monotonic() + seconds

    def call(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while time.monotonic() < until_s:
            body = bodies[counts[number] % len(bodies)]
            connection.request("POST", f"/sessions/call-{number}/utterances", body)
            answer = connection.getresponse()
            content = answer.read()
            assert answer.status == 200, content
            counts[number] += 1
        connection.close()

    began, cpu_before_s = time.monotonic(), cpu_s(process_id)
    threads = [threading.Thread(target=call, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Rate(sum(counts) / (time.monotonic() - began), 1000 * (cpu_s(process_id) - cpu_before_s) / sum(counts))


def measure(seconds: float, rounds: int, batch: int, wait_ms: float) -> dict[str, list[Rate]]:
    """Rates by arrangement, the arrangements in turn."""
    with tempfile.TemporaryDirectory() as folder:
        (dialogue,) = write_wavs(list(make_dialogues("test", seed=11, count=1)), Path(folder))
        bodies = [utterance.audio.read_bytes() for utterance in dialogue.utterances]
        rates: dict[str, list[Rate]] = {}
        with server("--batch", "1") as single, server("--batch", str(batch), "--wait-ms", str(wait_ms)) as batched:
            arrangements = {
                "one caller, one utterance in a forward": (single, 1),
                f"{CALLERS} callers, one utterance in a forward": (single, CALLERS),
                f"{CALLERS} callers, up to {batch} in a forward": (batched, CALLERS),
            }
            for process, callers in arrangements.values():
                rate(process, callers, bodies, min(seconds, 1.0))
            for _ in range(rounds):
                for name, (process, callers) in arrangements.items():
                    rates.setdefault(name, []).append(rate(process, callers, bodies, seconds))
    return rates


def main() -> None:
    """Print the rates, and their ratios to the first arrangement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each arrangement in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--wait-ms", type=float, default=5.0)
    options = parser.parse_args()
    rates = measure(options.seconds, options.rounds, options.batch, options.wait_ms)
    first = next(iter(rates.values()))
    for name, measured in rates.items():
        ratios = [own.per_s / base.per_s for own, base in zip(measured, first, strict=True)]
        per_s, cpu_ms = (statistics.median(column) for column in zip(*measured, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"
        print(f"{name:42} {per_s:6.1f} per second, ratio {spread}; {cpu_ms:5.1f} ms of CPU each")


if __name__ == "__main__":
    main()
