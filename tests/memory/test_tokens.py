"""read_tokens and write_tokens: rows of any length in one flat list, each as if it were alone."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_adapter.errors import AudioMaskError, StateMismatchError
from mal_adapter.memory.spans import Spans
from tests.memory.test_adapter import make_adapter

CPU = torch.device("cpu")
ragged = st.lists(st.integers(0, 12), min_size=1, max_size=4)
updates = st.sampled_from(["titans", "titans", "running_mean", "gru", "none"])


@settings(max_examples=60, deadline=None)
@given(
    lengths=ragged,
    update=updates,
    depth=st.sampled_from([1, 2]),
    pool=st.booleans(),
    causal=st.booleans(),
    masked=st.booleans(),
    grad=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_each_row_is_as_if_it_were_alone(lengths, update, depth, pool, causal, masked, grad, seed):
    adapter = make_adapter(seed, update=update, depth=depth, pool_utterance=pool, chunk_size=5).double()
    spans = Spans(lengths, CPU)
    tokens = torch.randn(spans.total, 16, dtype=torch.float64)
    valid = torch.rand(spans.total) < 0.7 if masked else None
    with torch.set_grad_enabled(grad):
        state = adapter.initial_state(len(lengths))
        for _ in range(2):
            state = adapter.write_tokens(state, tokens, spans, valid, causal=causal)
        residual = adapter.read_tokens(state, tokens, spans, valid, causal=causal)
        starts = spans.offsets.tolist()
        for row, (start, end) in enumerate(itertools.pairwise(starts)):
            own = tokens[start:end][None]
            mask = None if valid is None else valid[start:end][None]
            alone = adapter.initial_state()
            for _ in range(2):
                alone = adapter.write(alone, own, mask, causal=causal)
            together = state.split()[row]
            for a, b in zip((*together.weights, *together.momentum), (*alone.weights, *alone.momentum), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
            assert [together.utterances, together.tokens] == [alone.utterances, alone.tokens]
            expected = adapter.read(alone, own, mask, causal=causal)[0]
            torch.testing.assert_close(residual[start:end], expected, rtol=1e-9, atol=1e-12)
    if valid is not None:
        assert not residual[~valid].any()


@settings(max_examples=40, deadline=None)
@given(
    lengths=ragged, update=updates, causal=st.booleans(), bad=st.sampled_from(["nan", "inf"]), seed=st.integers(0, 99)
)
def test_numbers_outside_of_valid_touch_nothing_and_get_no_gradient(lengths, update, causal, bad, seed):
    adapter = make_adapter(seed, update=update).train()
    spans = Spans(lengths, CPU)
    tokens = torch.randn(spans.total, 16)
    valid = torch.rand(spans.total) < 0.6
    poisoned = tokens.masked_fill(~valid[:, None], float(bad)).requires_grad_()
    results = []
    for given_tokens in (tokens, poisoned):
        state = adapter.write_tokens(adapter.initial_state(len(lengths)), given_tokens, spans, valid, causal=causal)
        residual = adapter.read_tokens(state, given_tokens, spans, valid, causal=causal)
        results.append((*state.weights, *state.momentum, residual))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    (residual.square().sum() + sum(w.square().sum() for w in state.weights)).backward()
    assert not poisoned.grad[~valid].any()
    assert poisoned.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in adapter.parameters())


@settings(max_examples=40, deadline=None)
@given(lengths=ragged, update=updates, grad=st.booleans(), bad=st.sampled_from(["nan", "inf", "-inf"]), data=st.data())
def test_a_row_that_is_not_finite_is_skipped_and_no_other(lengths, update, grad, bad, data):
    adapter = make_adapter(update=update)
    spans = Spans(lengths, CPU)
    tokens = torch.randn(spans.total, 16)
    before = adapter.write_tokens(adapter.initial_state(len(lengths)), tokens, spans)
    poisoned = tokens.clone()
    hit = data.draw(st.lists(st.integers(0, spans.total - 1), max_size=3)) if spans.total else []
    poisoned[hit, 5] = float(bad)
    lost = {int(spans.row_of_token[token]) for token in hit}
    with torch.set_grad_enabled(grad):
        after = adapter.write_tokens(before, poisoned, spans)
        clean = adapter.write_tokens(before, tokens, spans)
    assert after.skipped_writes.tolist() == [int(row in lost) for row in range(len(lengths))]
    assert after.utterances.tolist() == [2 - (row in lost) if n else 0 for row, n in enumerate(lengths)]
    assert after.tokens.tolist() == [n * (2 - (row in lost)) for row, n in enumerate(lengths)]
    for now, old, new in zip(after.weights, before.weights, clean.weights, strict=True):
        for row in range(len(lengths)):
            assert torch.equal(now[row], (old if row in lost else new)[row])


def test_wrong_shapes_are_refused():
    adapter, spans = make_adapter(), Spans([2, 3], CPU)
    state = adapter.initial_state(2)
    with pytest.raises(AudioMaskError, match=r"\(4, 16\), expected \(5, 16\)"):
        adapter.read_tokens(state, torch.zeros(4, 16), spans)
    with pytest.raises(AudioMaskError, match=r"\(5, 15\), expected \(5, 16\)"):
        adapter.write_tokens(state, torch.zeros(5, 15), spans)
    with pytest.raises(AudioMaskError, match=r"float32 \(5,\), expected bool"):
        adapter.read_tokens(state, torch.zeros(5, 16), spans, torch.zeros(5))
    with pytest.raises(StateMismatchError, match="1 dialogues"):
        adapter.write_tokens(adapter.initial_state(), torch.zeros(5, 16), spans)
