"""Requests per second of `mal-adapter serve` on the package's host: 16 callers against one at a time, in one run.

python -m tests.benchmarks.serving                 # a minute; two server processes, the clients in this one
python -m tests.benchmarks.serving --rounds 30 --batch 16

Other processes slow down 16 callers more than one, who leaves a core of two idle: the share that they took is printed.
"""

import argparse
import contextlib
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mal_adapter.demo.dialogues import make_dialogues, write_wavs

CALLERS = 16


@contextlib.contextmanager
def server(*options: str) -> Iterator[tuple[int, int]]:
    """A server process with one thread per operation. Yields its process id and port."""
    command = [sys.executable, "-m", "mal_adapter.cli", "serve", "--port", "0", "--json", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True)
    try:
        assert process.stdout is not None
        lines: list[str] = []
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


def busy_s() -> float:
    """The CPU time of the whole machine; Linux only."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Rate(NamedTuple):
    per_s: float
    cpu_ms: float
    """Of the server, per answer."""
    client_ms: float
    """CPU time of this process, per answer."""
    others: float
    """The share of all cores that other processes took meanwhile."""


class Caller:
    """A connection and a session. Sends its next utterance after an answer. A bare socket, which takes little CPU."""

    def __init__(self, number: int, port: int, bodies: list[bytes]) -> None:
        head = f"POST /sessions/call-{number}/utterances HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
        self._requests = [f"{head}{len(body)}\r\n\r\n".encode() + body for body in bodies]
        self._received = b""
        self.answers = 0
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self) -> None:
        self.socket.sendall(self._requests[self.answers % len(self._requests)])

    def receive(self) -> bool:
        """Whether the answer is complete."""
        part = self.socket.recv(1 << 16)
        assert part, "the server has closed a connection"
        self._received += part
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end or len(body) < int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0]):
            return False
        assert head.startswith(b"HTTP/1.1 200 "), self._received
        self._received = b""
        self.answers += 1
        return True


def rate(server: tuple[int, int], callers: int, bodies: list[bytes], seconds: float) -> Rate:
    """Answers per second of callers that each wait for one answer at a time; all in one thread."""
    process_id, port = server
    with selectors.DefaultSelector() as ready, contextlib.ExitStack() as sockets:
        waiting = [Caller(number, port, bodies) for number in range(callers)]
        for caller in waiting:
            sockets.enter_context(caller.socket)
            ready.register(caller.socket, selectors.EVENT_READ, caller)
        began, before_s = time.monotonic(), (cpu_s(process_id), time.process_time(), busy_s())
        for caller in waiting:
            caller.send()
        open_requests = callers
        while open_requests:
            for key, _ in ready.select():
                if key.data.receive():
                    if time.monotonic() - began < seconds:
                        key.data.send()
                    else:
                        open_requests -= 1
        elapsed_s, answers = time.monotonic() - began, sum(caller.answers for caller in waiting)
    after_s = (cpu_s(process_id), time.process_time(), busy_s())
    server_s, client_s, all_s = (after - before for after, before in zip(after_s, before_s, strict=True))
    others = max(0.0, all_s - server_s - client_s) / elapsed_s / (os.cpu_count() or 1)
    return Rate(answers / elapsed_s, 1000 * server_s / answers, 1000 * client_s / answers, others)


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
    parser.add_argument("--seconds", type=float, default=1.5, help="of each arrangement in a round")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--wait-ms", type=float, default=5.0)
    options = parser.parse_args()
    rates = measure(options.seconds, options.rounds, options.batch, options.wait_ms)
    first, cores = next(iter(rates.values())), os.cpu_count()
    for name, measured in rates.items():
        faster = [own.per_s / base.per_s for own, base in zip(measured, first, strict=True)]
        cheaper = [base.cpu_ms / own.cpu_ms for own, base in zip(measured, first, strict=True)]
        per_s, cpu_ms, client_ms, others = (statistics.median(column) for column in zip(*measured, strict=True))
        print(f"{name}: {per_s:.1f} per second, {_spread(faster)} times the first")
        print(f"    {cpu_ms:.1f} ms of the server's CPU each; the first costs {_spread(cheaper)} times as much")
        print(f"    {client_ms:.2f} ms of the clients' CPU each; other processes took {others:.0%} of {cores} cores")


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"


if __name__ == "__main__":
    main()
