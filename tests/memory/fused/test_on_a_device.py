"""The same checks as in the interpreter, with compiled kernels on a GPU, at the sizes that are served and trained."""

import pytest
import torch

from mal_adapter import MemoryAdapter, MemoryConfig
from mal_adapter.memory import fused
from tests.memory.fused.problems import STABLE, Problem, assert_close, grads, read_row_by_row, write_row_by_row

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

SIZES = [
    {"depth": 1, "d": 64},
    {"depth": 1, "d": 128, "chunk_size": 128},
    {"depth": 2, "d": 64, "h": 128},
    {"depth": 2, "d": 16, "h": 144, "chunk_size": 7},
    {"depth": 2, "d": 128, "h": 256},
    {"depth": 2, "d": 40, "h": 80, "chunk_size": 100, "dtype": torch.bfloat16},
]


def draw(sizes: dict, **more) -> Problem:
    lengths = (250, 0, 61, 1)
    return Problem.draw(device="cuda", heads=2, lengths=lengths, **{"chunk_size": 64, **sizes, **more})


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("gates", [STABLE, (-4.0, 0.0, -8.0), (3.0, 3.0, -3.0)])
def test_writes_reads_and_derivatives_equal_float64(sizes, gates):
    ours = draw(sizes, gates=gates, masked=(0.3, 0, 1, 0)).for_gradients()
    if not fused.takes_write(ours.initial, ours.keys, ours.chunk_size):
        pytest.skip(fused.path(MemoryConfig(), ours.keys.device))
    exact = ours.for_gradients(torch.float64)
    rounding = {torch.float32: 0, torch.bfloat16: 2**-8}[ours.keys.dtype]
    written, want = ours.write(), write_row_by_row(exact)
    assert_close(written, want, 1e-5)
    assert_close(grads(written, ours, 1), grads(want, exact, 1), 5e-5 + rounding)
    with torch.no_grad():
        assert_close(ours.write(), want, 1e-5)
    ours = draw(sizes).for_gradients()
    exact = ours.for_gradients(torch.float64)
    answers, want = ours.read(True), read_row_by_row(exact, True)
    assert_close([answers], [want])
    assert_close(grads([answers], ours, 2), grads([want], exact, 2), 5e-5 + rounding)


@pytest.mark.parametrize("sizes", SIZES[:5], ids=str)
def test_two_runs_are_equal_bit_for_bit(sizes):
    """A race between threads would show here."""
    ours = draw(sizes).for_gradients()
    runs = [[*(written := ours.write()), *grads(written, ours, 3)] for _ in range(5)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_tf32_is_taken_where_it_is_allowed():
    problem = draw(SIZES[2])
    want = write_row_by_row(problem.for_gradients(torch.float64))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with torch.no_grad():
            written = problem.write()
    finally:
        torch.set_float32_matmul_precision(before)
    assert_close(written, want, 1e-2)
    with pytest.raises(AssertionError):
        assert_close(written, want, 1e-6)


def test_other_rows_survive_nan():
    problem = draw(SIZES[2])
    broken = problem.with_leaves([t.clone() for t in problem.leaves()])
    broken.values[260, 1] = float("nan")
    with torch.no_grad():
        for new, old in zip(broken.write(), problem.write(), strict=True):
            assert torch.equal(new[[0, 1, 3]], old[[0, 1, 3]])
            assert torch.equal(new[2, 0], old[2, 0])
            assert not new[2, 1].isfinite().all()


def test_a_capture_replays_with_new_rows():
    problem = draw(SIZES[2])
    spans = problem.spans
    assert len(spans.offsets) == 5  # copied before the capture
    assert fused.takes_write(problem.initial, problem.keys, 64)
    assert fused.takes_read(problem.initial, problem.keys)
    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        keys, values = problem.keys.clone(), problem.values.clone()
        with torch.cuda.graph(graph):
            weights, _ = fused.write(*problem[:3], keys, values, problem.gates, spans, None, 64)
            answers = fused.read(problem.initial, weights, keys, spans)
        keys.copy_(keys.flip(0))
        graph.replay()
        fresh, _ = fused.write(*problem[:3], keys, values, problem.gates, spans, None, 64)
        assert all(torch.equal(a, b) for a, b in zip(weights, fresh, strict=True))
        assert torch.equal(answers, fused.read(problem.initial, fresh, keys, spans))


def test_an_adapter_on_the_device_equals_the_cpu():
    torch.manual_seed(0)
    adapter = MemoryAdapter(MemoryConfig(hidden_size=64, memory_dim=128, num_heads=2))
    torch.nn.init.normal_(adapter.readout_out.weight)
    hidden_states = torch.randn(3, 70, 64)
    mask = torch.arange(70) < torch.tensor([70, 33, 0])[:, None]

    def run(device: str) -> list[torch.Tensor]:
        adapter.to(device).zero_grad()
        x, m = hidden_states.to(device), mask.to(device)
        state = adapter.write(adapter.initial_state(3), x, m)
        residual = adapter.read(state, x, m)
        residual.square().sum().backward()
        found = [residual, *state.weights, *state.momentum, *(p.grad for p in adapter.parameters())]
        return [t.detach().cpu().clone() for t in found]

    theirs = run("cpu")
    assert_close(run("cuda"), [t.double() for t in theirs], 1e-3)


def test_an_adapter_with_a_padded_batch_can_be_captured():
    adapter = MemoryAdapter(MemoryConfig(hidden_size=64, memory_dim=128, num_heads=2)).eval().cuda()
    x = torch.randn(3, 70, 64, device="cuda")
    mask = torch.ones(3, 70, dtype=torch.bool, device="cuda")
    state = adapter.initial_state(3)
    with torch.no_grad():
        want = adapter.write(state, x, mask)  # compiles the kernels
        adapter.read(state, x, mask)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            written = adapter.write(state, x, mask)
            adapter.read(written, x, mask)
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(written.weights, want.weights, strict=True))
