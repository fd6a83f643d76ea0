"""Projections in half precision, as on a GPU: how exact they are, and when the cast weights are made anew."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_adapter import MemoryAdapter, MemoryConfig
from mal_adapter.memory.half import HalfCache
from mal_adapter.memory.spans import Spans
from tests.memory.test_adapter import make_adapter

CPU = torch.device("cpu")
DTYPES = st.sampled_from([torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True)
def _on_the_cpu_too(monkeypatch):
    monkeypatch.setattr(HalfCache, "devices", ("cpu", "cuda"))


def realistic(seed: int = 0, **fields) -> MemoryAdapter:
    """An adapter with numbers as after training: every parameter moved, the weights of their usual size."""
    torch.manual_seed(seed)
    adapter = MemoryAdapter(MemoryConfig(**{"hidden_size": 64, "memory_dim": 32, "num_heads": 2, **fields})).eval()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return adapter


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


# What bounds it is the rounding of weights and normalised tokens, a unit in the last place of each: 2⁻⁹ and 2⁻¹².
BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    pool=st.booleans(),
    causal=st.booleans(),
    masked=st.booleans(),
    update=st.sampled_from(["titans", "titans", "running_mean", "gru", "none"]),
    dtype=DTYPES,
    seed=st.integers(0, 1000),
)
@torch.no_grad()
def test_half_precision_is_near_float64(lengths, pool, causal, masked, update, dtype, seed):
    adapter = realistic(seed, pool_utterance=pool, update=update)
    exact = copy.deepcopy(adapter).double()
    spans = Spans(lengths, CPU)
    tokens = torch.randn(spans.total, 64).to(dtype)
    valid = torch.rand(spans.total) < 0.8 if masked else None
    states = [a.initial_state(len(lengths)) for a in (adapter, exact)]
    for _ in range(2):
        states = [
            a.write_tokens(s, t, spans, valid, causal=causal)
            for a, s, t in zip((adapter, exact), states, (tokens, tokens.double()), strict=True)
        ]
    read = adapter.read_tokens(states[0], tokens, spans, valid, causal=causal)
    assert read.dtype == dtype
    assert adapter._half._cast is not None  # so it is half precision that is compared
    for ours, theirs in zip(states[0].weights, states[1].weights, strict=True):
        assert ours.dtype == torch.float32
        assert error(ours, theirs) < BOUNDS[dtype]
    expected = exact.read_tokens(states[1], tokens.double(), spans, valid, causal=causal)
    assert error(read, expected) < BOUNDS[dtype]
    if valid is not None:
        assert not read[~valid].any()


@settings(max_examples=20, deadline=None)
@given(dtype=DTYPES, causal=st.booleans(), bad=st.sampled_from(["nan", "inf"]))
@torch.no_grad()
def test_bad_numbers_touch_nothing_else(dtype, causal, bad):
    """Outside of `valid` not even their own row, inside of it no other row."""
    adapter, spans = realistic(), Spans([5, 4, 6], CPU)
    tokens = torch.randn(spans.total, 64).to(dtype)
    valid = torch.ones(spans.total, dtype=torch.bool)
    valid[2] = False
    hidden = tokens.clone()
    hidden[2] = float(bad)
    state = adapter.initial_state(3)
    clean, poisoned = (adapter.write_tokens(state, t, spans, valid, causal=causal) for t in (tokens, hidden))
    assert clean.equals(poisoned)
    assert torch.equal(*(adapter.read_tokens(clean, t, spans, valid, causal=causal) for t in (tokens, hidden)))
    hidden[7] = float(bad)
    skipped = adapter.write_tokens(clean, hidden, spans, valid, causal=causal)
    assert skipped.skipped_writes.tolist() == [0, 1, 0]
    again = adapter.write_tokens(clean, tokens, spans, valid, causal=causal)
    for old, new, now in zip(clean.weights, again.weights, skipped.weights, strict=True):
        assert torch.equal(now, torch.stack((new[0], old[1], new[2])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_fresh_adapter_has_a_residual_of_exactly_zero(dtype):
    adapter = make_adapter(trained=False)
    tokens, spans = torch.randn(9, 16).to(dtype), Spans([9], CPU)
    state = adapter.write_tokens(adapter.initial_state(), tokens, spans)
    assert not adapter.read_tokens(state, tokens, spans).any()


@torch.no_grad()
def test_the_mean_of_a_long_utterance_does_not_overflow():
    adapter = MemoryAdapter(MemoryConfig(hidden_size=32, memory_dim=16, num_heads=2)).eval()
    adapter.norm.bias += 40
    adapter.readout_out.weight.normal_()
    spans, tokens = Spans([2000], CPU), torch.randn(2000, 32).half()
    state = adapter.write_tokens(adapter.initial_state(), tokens, spans)
    assert state.utterances.tolist() == [1]
    assert adapter.read_tokens(state, tokens, spans).isfinite().all()


CHANGES = {
    "a step of an optimizer": lambda a: a.in_proj.weight.add_(0.1),
    "another tensor": lambda a: setattr(a.readout_in, "weight", torch.nn.Parameter(a.readout_in.weight * 2)),
    "loading": lambda a: a.load_state_dict({n: t + 0.1 for n, t in a.state_dict().items()}),
    "assigning": lambda a: a.load_state_dict({n: t + 0.1 for n, t in a.state_dict().items()}, assign=True),
    "half precision": lambda a: a.bfloat16(),
    "data": lambda a: setattr(a.norm.weight, "data", a.norm.weight + 1),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_weights_are_cast_again_after(change):
    adapter = realistic()
    tokens, spans = torch.randn(9, 64).bfloat16(), Spans([9], CPU)
    state = MemoryAdapter.initial_state(copy.deepcopy(adapter).train())  # of no adapter, since this one changes
    before = adapter.read_tokens(state, tokens, spans)
    first = adapter._half._cast
    assert torch.equal(adapter.read_tokens(state, tokens, spans), before)
    assert adapter._half._cast is first  # only once
    CHANGES[change](adapter)
    changed = adapter.read_tokens(state, tokens, spans)
    adapter._half.drop()
    assert torch.equal(changed, adapter.read_tokens(state, tokens, spans))
    assert not torch.equal(changed, before) or change == "half precision"


def test_cast_weights_are_neither_trained_nor_saved_nor_copied():
    adapter = realistic()
    tokens, spans = torch.randn(9, 64).bfloat16(), Spans([9], CPU)
    names, state = list(adapter.state_dict()), adapter.initial_state()
    with torch.inference_mode():
        adapter.read_tokens(state, tokens, spans)
    assert adapter._half._cast is not None
    assert list(adapter.state_dict()) == names
    for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert twin._half._cast is None
        assert twin.fingerprint() == adapter.fingerprint()
    assert len(pickle.dumps(adapter)) < len(pickle.dumps(copy.deepcopy(adapter))) + 100
    with torch.no_grad():  # what was cast in inference mode is used outside of it
        adapter.read_tokens(state, tokens, spans)
    residual = adapter.read_tokens(state, tokens, spans)  # a gradient is recorded: full precision
    exact = copy.deepcopy(adapter).double().read_tokens(adapter.initial_state().map(_double), tokens.double(), spans)
    assert error(residual, exact) < 4e-3
    residual.sum().backward()
    assert adapter.readout_in.weight.grad.dtype == torch.float32
    adapter.train()
    assert adapter._half._cast is None
    with torch.no_grad():
        adapter.read_tokens(adapter.initial_state(), tokens, spans)
    assert adapter._half._cast is None


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
