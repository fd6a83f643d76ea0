"""The memory itself, compared with its peers and with bare matrix products; and its peak memory."""

import itertools
import subprocess
import sys
from collections.abc import Iterator

import torch
from torch import nn

from mal_adapter.memory.gates import Gates
from mal_adapter.memory.reference import write_by_token
from mal_adapter.memory.titans import write
from tests.benchmarks.modules import Ours, bare_gemms, forward, forward_backward, titans_pytorch, titans_unofficial
from tests.benchmarks.rows import Row
from tests.benchmarks.timing import interleaved, peak_bytes

MODES = {"forward": forward, "forward + backward": forward_backward}
GRID = tuple(itertools.product((1, 8, 32), (128, 512, 1536), (64, 128, 256)))


def check(device: str) -> None:
    """Before any timing: check that the write equals the reference, and that all modules give finite numbers."""
    torch.manual_seed(0)
    initial = (torch.randn(1, 4, 8), torch.randn(1, 8, 4))
    zeros = tuple(torch.zeros(2, *w.shape) for w in initial)
    keys, values = nn.functional.normalize(torch.randn(2, 1, 9, 4), dim=-1), torch.randn(2, 1, 9, 4)
    arguments = initial, zeros, zeros, keys, values, Gates(*torch.randn(3, 2, 1, 9)), torch.ones(2, 9).bool(), 4
    for ours, theirs in zip(
        itertools.chain(*write(*arguments)), itertools.chain(*write_by_token(*arguments)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    x = torch.randn(1, 128, 64, device=device)
    for module in (Ours(64, 64), titans_pytorch(64, 64), titans_unofficial(64)):
        answer, state = module.to(device)(x)
        assert all(t.isfinite().all() for t in (answer, *state))


def same_semantics(device: str, seconds: float) -> Iterator[Row]:
    """Peers that gate each token."""
    x = torch.randn(1, 256, 64, device=device)
    ours = Ours(64, 64).to(device)
    for name, peer, targets in (
        ("titans-pytorch, gates per token", titans_pytorch(64, 1), (40, 30)),
        ("titans-unofficial", titans_unofficial(64), (None, None)),
    ):
        for (mode, run), target in zip(MODES.items(), targets, strict=True):
            mine, theirs = interleaved(run(ours, x), run(peer.to(device), x), seconds=seconds, device=device)
            size = "B1 T256 d64, chunk 64"
            yield Row(f"against {name}, {mode}", size, theirs.median / mine.median, "≥", target, (mine, theirs))


def fastest_mode(device: str, seconds: float) -> Iterator[Row]:
    """titans-pytorch with gates per chunk and gradients at the first weights of all."""
    for batch, seq_len, d in GRID:
        x = torch.randn(batch, seq_len, d, device=device)
        ours, peer = Ours(d, 64).to(device), titans_pytorch(d, 64).to(device)
        for (mode, run), target in zip(MODES.items(), (2, 1.5), strict=True):
            mine, theirs = interleaved(run(ours, x), run(peer, x), seconds=seconds, device=device)
            ratio, size = theirs.median / mine.median, f"B{batch} T{seq_len} d{d}"
            yield Row(f"against titans-pytorch's fastest, chunk 64, {mode}", size, ratio, "≥", target, (mine, theirs))


def efficiency(device: str, seconds: float) -> Iterator[Row]:
    """How much of a write is matrix products."""
    for (batch, seq_len, d), whole in itertools.product(
        ((1, 512, 128), (8, 512, 128), (1, 1536, 256), (8, 1536, 256)), (True, False)
    ):
        chunk_size = seq_len if whole else 64
        arguments = _write_arguments(batch, seq_len, d, chunk_size, device)
        for backward, target in ((False, 0.85 if whole else 0.65), (True, 0.75 if whole else 0.5)):
            bare = bare_gemms(batch, seq_len, d, chunk_size, device, backward=backward)
            run = _write_and_back(arguments) if backward else _write(arguments)
            mine, theirs = interleaved(run, bare, seconds=seconds, device=device)
            name = f"bare GEMMs / write, {'whole utterance' if whole else 'chunk 64'}, {list(MODES)[backward]}"
            yield Row(name, f"B{batch} T{seq_len} d{d}", theirs.median / mine.median, "≥", target, (mine, theirs))


def _write_arguments(batch: int, seq_len: int, d: int, chunk_size: int, device: str):  # type: ignore[no-untyped-def]
    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device)

    initial = (some(1, d, 2 * d) / d**0.5, some(1, 2 * d, d) / (2 * d) ** 0.5)
    state = tuple(0.1 * some(batch, *w.shape) for w in initial)
    keys = nn.functional.normalize(some(batch, 1, seq_len, d), dim=-1)
    gates = Gates(some(batch, 1, seq_len) - 4, some(batch, 1, seq_len), some(batch, 1, seq_len) - 8)
    mask = torch.ones(batch, seq_len, dtype=torch.bool, device=device)
    return initial, state, state, keys, some(batch, 1, seq_len, d), gates, mask, chunk_size


def _write(arguments):  # type: ignore[no-untyped-def]
    def run() -> None:
        with torch.no_grad():
            write(*arguments)

    return run


def _write_and_back(arguments):  # type: ignore[no-untyped-def]
    initial, weights, momentum, keys, values, gates, mask, chunk_size = arguments
    leaves = [t.clone().requires_grad_() for t in (*initial, *weights, *momentum, keys, values, *gates)]

    def run() -> None:
        w0, w, s, (k, v), g = (leaves[i:j] for i, j in ((0, 2), (2, 4), (4, 6), (6, 8), (8, 11)))
        new = itertools.chain(*write(tuple(w0), tuple(w), tuple(s), k, v, Gates(*g), mask, chunk_size))
        torch.autograd.grad(sum(t.sum() for t in new), leaves)

    return run


def peak_memory(device: str, seconds: float) -> Iterator[Row]:
    """Growth of memory up to the peak, each in its own process; on the CPU only, where it can be read."""
    for batch, seq_len, d in ((8, 512, 128), (1, 1536, 256)):
        for mode, target in zip(MODES, (1 / 3, 1 / 2), strict=True):
            mine, theirs = (_peak(who, mode, batch, seq_len, d) for who in ("ours", "titans-pytorch"))
            name = f"peak memory / titans-pytorch's fastest, chunk 64, {mode}"
            note = f"{mine >> 20} and {theirs >> 20} MiB"
            yield Row(name, f"B{batch} T{seq_len} d{d}", mine / theirs, "≤", target, note=note)


def _peak(who: str, mode: str, *size: int) -> int:
    command = [sys.executable, "-m", "tests.benchmarks.write_and_read", who, mode, *map(str, size)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


if __name__ == "__main__":  # the process whose peak is measured
    torch.set_num_threads(1)
    who, mode, batch, seq_len, d = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
    module = Ours(d, 64) if who == "ours" else titans_pytorch(d, 64)
    MODES[mode](module, torch.randn(1, 128, d))()  # so that libraries loaded by the first call are not counted
    print(peak_bytes(MODES[mode](module, torch.randn(batch, seq_len, d))))
