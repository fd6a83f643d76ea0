"""A read and a write never wait for the device: no number is read back, and nothing is copied from the host."""

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mal_adapter.memory.config import UPDATES
from mal_adapter.memory.half import HalfCache
from mal_adapter.memory.spans import Spans
from tests.memory.test_adapter import make_adapter

CPU = torch.device("cpu")

# What waits for the device: a number that the host asks for, a size that depends on numbers, tensors from Python's
# numbers. `torch.tensor` calls lift_fresh.
WAITS = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "masked_select",
    "unique",
    "repeat_interleave",
    "equal",
    "lift_fresh",
}


class NoWaits(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{func} waits for the device"
        if name == "index":
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "an index by a mask waits for the device"
        return func(*args, **(kwargs or {}))


def test_the_mode_finds_waits():
    x = torch.ones(3)
    for wait in (
        lambda: x[0].item(),
        lambda: bool(x.any()),
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: torch.tensor([1.0]),
        lambda: x.int().repeat_interleave(x.int()),
    ):
        with pytest.raises(AssertionError, match="waits for the device"), NoWaits():
            wait()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", [[7], [4, 4], [5, 2, 0]])
@pytest.mark.parametrize("update", UPDATES)
def test_no_wait_in_a_read_and_a_write(update, lengths, masked, causal, half, monkeypatch):
    monkeypatch.setattr(HalfCache, "devices", ("cpu",) if half else ())
    adapter, spans = make_adapter(update=update, num_labels=3), Spans(lengths, CPU).prepare()
    probabilities = torch.rand(len(lengths), 3).softmax(-1)
    tokens = torch.randn(spans.total, 16, dtype=torch.bfloat16)
    valid = torch.rand(spans.total) < 0.7 if masked else None
    state = adapter.initial_state(len(lengths))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            adapter.read_tokens(state, tokens, spans, valid, causal=causal)  # casts the weights
            with NoWaits():
                residual = adapter.read_tokens(state, tokens, spans, valid, causal=causal)
                state = adapter.write_tokens(state, tokens + residual, spans, valid, causal=causal)
                state = adapter.write_answers(state, probabilities)


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_the_padded_read_and_write_do_not_wait_either(masked):
    """Nor do they copy anything from the host: rows are equally long, so their offsets are computed."""
    adapter, hidden = make_adapter(), torch.randn(2, 7, 16)
    mask = torch.rand(2, 7) < 0.7 if masked else None
    state = adapter.initial_state(2)
    with NoWaits():
        adapter.write(state, hidden + adapter.read(state, hidden, mask), mask)
        Spans([7, 7], CPU).prepare()


TRACED = """
import torch
from mal_adapter import MemoryAdapter, MemoryConfig
from mal_adapter.memory.spans import Spans

torch.manual_seed(0)
adapter = MemoryAdapter(MemoryConfig(hidden_size=16, memory_dim=8, num_heads=2)).eval()
torch.nn.init.normal_(adapter.readout_out.weight)

def run(state, tokens, spans):
    residual = adapter.read_tokens(state, tokens, spans)
    return residual, adapter.write_tokens(state, tokens + residual, spans)

traced = torch.compile(run, fullgraph=True, backend="eager")
with torch.no_grad():
    for lengths in ([7], [5, 2]):
        spans = Spans(lengths, torch.device("cpu")).prepare()
        tokens, state = torch.randn(spans.total, 16), adapter.initial_state(len(lengths))
        for _ in range(2):
            (residual, after), (expected, state) = (f(state, tokens, spans) for f in (traced, run))
            torch.testing.assert_close(residual, expected)
            torch.testing.assert_close((after.weights, after.utterances), (state.weights, state.utterances))
            assert residual.any()
print("equal")
"""


def test_a_traced_read_and_write_are_one_graph():
    """In a process of its own, where no annotation is checked: torch.compile can't trace those checks."""
    done = subprocess.run([sys.executable, "-c", TRACED], capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr
