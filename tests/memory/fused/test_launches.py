"""How often a read and a write of one utterance launch a kernel on a GPU, with the memory in kernels: counted here.

Each operation of PyTorch that computes or copies is one launch, and each launch of Triton's is one.
"""

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from mal_adapter import MemoryAdapter, MemoryConfig
from mal_adapter.memory import half
from mal_adapter.memory.spans import Spans
from tests.benchmarks.timing import kernels
from tests.memory.fused.interpreter import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="no Triton, or one with a GPU")

TOKENS = 250


@pytest.fixture
def launches(monkeypatch) -> kernels:
    """Counts while it is entered."""
    count = kernels()

    def as_one(function, name):
        def call(*args, **kwargs):
            before = len(count.names)
            result = function(*args, **kwargs)
            count.names[before:] = [name]
            return result

        return call

    run = GridExecutor.__call__
    monkeypatch.setattr(GridExecutor, "__call__", as_one(run, "triton"))
    # On a GPU, a product of half precision with float32 results; on a CPU this takes casts.
    monkeypatch.setattr(half, "_linear", as_one(half._linear, "gemm"))
    return count


def of_a_device(names: list[str]) -> list[str]:
    """Without allocations, and without the operators that launch Triton's kernels, which are counted themselves."""
    return [name for name in names if not name.startswith(("aten.empty", "aten.new_empty", "mal_adapter."))]


@pytest.mark.parametrize(
    ("dtype", "masked", "most"),
    [
        (torch.bfloat16, False, (13, 12)),
        (torch.float16, False, (13, 12)),
        (torch.float32, False, (12, 13)),
        (torch.bfloat16, True, (20, 18)),
    ],
)
@torch.no_grad()
def test_a_read_and_a_write_launch_few_kernels(dtype, masked, most, launches, monkeypatch):
    monkeypatch.setattr(half.HalfCache, "devices", ("cpu",))
    adapter = MemoryAdapter(MemoryConfig(hidden_size=32, memory_dim=32, num_heads=2)).eval()
    tokens, spans = torch.randn(TOKENS, 32, dtype=dtype), Spans([TOKENS], torch.device("cpu")).prepare()
    valid = torch.arange(TOKENS) > 3 if masked else None
    state = adapter.write_tokens(adapter.initial_state(), tokens, spans, valid)
    adapter.read_tokens(state, tokens, spans, valid)
    counted = []
    for action in (adapter.read_tokens, adapter.write_tokens):
        launches.names.clear()
        with launches:
            action(state, tokens, spans, valid)
        counted.append(of_a_device(launches.names))
    read, write = counted
    assert (read.count("triton"), write.count("triton")) == (1, 4)  # scalars, chunks, check and keep
    assert len(read) <= most[0], read
    assert len(write) <= most[1], write
    assert masked or len(read) + len(write) <= 30
