"""What the kernels must leave alone, and what must not be lost in them: empty rows, masks, the bound, NaN."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mal_adapter import MemoryAdapter, MemoryConfig
from mal_adapter.memory import fused
from mal_adapter.memory.fused import scalars, write_kernels
from mal_adapter.memory.spans import Spans
from tests.memory.fused.interpreter import INTERPRETED
from tests.memory.fused.problems import STABLE, Problem, assert_close, grads, write_row_by_row

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="no Triton, or one with a GPU")

DEPTHS = pytest.mark.parametrize(
    "sizes", [{"depth": 1}, {"depth": 2}, {"depth": 2, "d": 80, "h": 80}], ids=["depth 1", "depth 2", "by blocks"]
)


class Operators(TorchDispatchMode):
    """Counts the operators that run within the block, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


@DEPTHS
def test_rows_without_valid_tokens_keep_their_state_bit_for_bit(sizes):
    problem = Problem.draw(lengths=(0, 20, 7), **sizes, masked=(0, 0.3, 1))
    ours = problem.for_gradients()
    written = ours.write()
    for new, old in zip(written, (*problem.weights, *problem.momentum), strict=True):
        assert torch.equal(new[0], old[0])
        assert torch.equal(new[2], old[2])
        assert not torch.equal(new[1], old[1])
    # What comes out is what went in, so its derivative is too; nothing comes from the masked row's NaN.
    n = sizes["depth"]
    d = grads([t[::2] for t in written], ours, seed=1)
    directions = grads([t[::2] for t in (*ours.weights, *ours.momentum)], ours, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(d[n : 3 * n], directions[n : 3 * n], strict=True))
    assert all(not t.any() for t in (*d[:n], *d[3 * n :]))


def test_no_tokens_at_all_return_the_state_itself():
    problem = Problem.draw(lengths=(0, 0), depth=1)
    weights, momentum = fused.write(*problem[:6], problem.spans, None, 16)
    assert weights is problem.weights
    assert momentum is problem.momentum
    assert problem.read().shape == (0, 1, 16)


@DEPTHS
def test_the_trust_region_bounds_long_steps_and_leaves_short_ones(sizes):
    for gates, bounded in (((3.0, 2.0, -8.0), True), (STABLE, False)):
        ours = Problem.draw(lengths=(40,), **sizes, gates=gates).for_gradients()
        exact = ours.for_gradients(torch.float64)
        written, want = ours.write(), write_row_by_row(exact)
        assert_close(written, want)
        assert_close(grads(written, ours, 2), grads(want, exact, 2), 5e-5)
        with torch.no_grad():
            rows = (ours.spans.offsets, None, 16)
            per_token, whole = scalars.chunk_scalars(*ours.gates, *rows, 40)
            if sizes["depth"] == 2:
                state = [list(t) for t in (ours.initial, ours.weights, ours.momentum)]
                saved = write_kernels.write_chunks(
                    *state, ours.keys, ours.values, per_token, whole, *rows, "ieee", True
                )[2]
                totals = saved.stats[..., :2]
            else:  # keys of unit length
                totals = torch.stack([per_token[i, 0].split(16)[0].sum() for i in (0, 2)])
        assert (totals.max() > 1) == bounded


@pytest.mark.parametrize("sizes", [{"depth": 1}, {"depth": 2}], ids=["depth 1", "depth 2"])
@pytest.mark.parametrize("where", ["keys", "values", "step", "momentum", "forget", "inf"])
def test_what_is_not_finite_spoils_its_row_and_head_and_no_other(sizes, where):
    clean = Problem.draw(lengths=(20, 20, 5), **sizes, heads=2, spread=1.0)
    leaves = [t.clone() for t in clean.leaves()]
    broken = clean.with_leaves(leaves)
    at = {"keys": broken.keys, "values": broken.values, "inf": broken.values}
    at |= dict(zip(("step", "momentum", "forget"), broken.gates, strict=True))
    at[where][27, 1] = float("inf" if where == "inf" else "nan")
    with torch.no_grad():
        written, want = broken.write(), clean.write()
    finite = torch.stack([t.flatten(2).isfinite().all(-1) for t in written]).all(0)
    assert finite.tolist() == [[True, True], [True, False], [True, True]]
    for new, old in zip(written, want, strict=True):
        assert torch.equal(new[finite], old[finite])


def test_any_strides_are_taken():
    ours = Problem.draw(lengths=(12, 20), heads=2, d=24, h=48)
    turned = ours.with_leaves([t.mT.contiguous().mT if t.dim() > 2 else t.T.contiguous().T for t in ours.leaves()])
    assert not any(t.is_contiguous() for t in turned.leaves())
    with torch.no_grad():
        for a, b in zip([*turned.write(), turned.read()], [*ours.write(), ours.read()], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("config", [{"depth": 1}, {"depth": 2}, {"depth": 2, "expansion": 9, "chunk_size": 7}])
def test_an_adapter_gives_the_same_with_and_without_kernels(config, monkeypatch):
    torch.manual_seed(0)
    config = MemoryConfig(hidden_size=24, memory_dim=32, num_heads=2, step_bias=0.0, **config)
    adapter = MemoryAdapter(config)
    torch.nn.init.normal_(adapter.readout_out.weight)
    hidden_states = torch.randn(3, 15, 24)
    mask = torch.arange(15) < torch.tensor([15, 4, 0])[:, None]

    def run() -> list[torch.Tensor]:
        adapter.zero_grad()
        state = adapter.write(adapter.initial_state(3), hidden_states, mask)
        residual = adapter.read(state, hidden_states, mask)
        residual.square().sum().backward()
        return [residual, *state.weights, *state.momentum, *(p.grad for p in adapter.parameters())]

    with Operators() as operators:
        ours = run()
    for name in ("write", "write_backward", "read", "read_backward"):
        assert operators.calls[f"mal_adapter::titans_{name}"] == 1
    monkeypatch.setenv("MAL_ADAPTER_FUSED", "0")
    with Operators() as operators:
        theirs = run()
    assert not any(name.startswith("mal_adapter::") for name in operators.calls)
    assert_close(ours, [t.double() for t in theirs], 2e-5)


def test_a_write_that_is_not_finite_is_skipped_and_counted():
    adapter = MemoryAdapter(MemoryConfig(hidden_size=24, memory_dim=16, num_heads=1)).eval()
    state = adapter.initial_state(2)
    for momentum in state.momentum:
        momentum[1] = torch.inf
    hidden_states = torch.randn(2, 30, 24)
    with torch.no_grad(), Operators() as operators:
        written = adapter.write(state, hidden_states)
    assert operators.calls["mal_adapter::titans_write"] == 1
    assert written.skipped_writes.tolist() == [0, 1]
    assert torch.equal(written.weights[0][1], state.weights[0][1])
    assert torch.equal(written.momentum[1][1], state.momentum[1][1])
    alone = adapter.write(adapter.initial_state(1), hidden_states[:1])
    assert_close([written.weights[1][0]], [alone.weights[1][0].double()])


def test_a_row_in_a_ragged_batch_is_the_row_alone():
    batch = Problem.draw(lengths=(31, 0, 5), heads=2, masked=(0.2, 0, 0))
    together = batch.write()
    for row, here in ((0, slice(0, 31)), (2, slice(31, 36))):
        n = len(batch.initial)
        leaves = [t if i < n else t[row : row + 1] if i < 3 * n else t[here] for i, t in enumerate(batch.leaves())]
        alone = batch.with_leaves(leaves)._replace(lengths=(batch.lengths[row],), valid=batch.valid[here])
        assert all(torch.equal(a[row], b[0]) for a, b in zip(together, alone.write(), strict=True))


def test_spans_that_hold_fewer_tokens_leave_the_rest_alone():
    """As in a buffer of fixed size, in which fewer tokens came than fit."""
    problem = Problem.draw(lengths=(9, 20))
    spans = Spans((9, 11), torch.device("cpu"))
    weights, _ = fused.write(*problem[:6], spans, None, 16)
    shorter = problem._replace(lengths=(9, 11)).with_leaves([t[:20] if len(t) == 29 else t for t in problem.leaves()])
    assert all(torch.equal(a, b) for a, b in zip(weights, shorter.write()[:2], strict=True))
