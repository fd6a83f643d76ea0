"""Spans: rows of any length in one flat list, padded and flattened without loss, with gradients and without a wait."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mal_adapter.memory.spans import Spans
from tests.benchmarks.timing import kernels

CPU = torch.device("cpu")
rows = st.lists(st.integers(0, 7), max_size=6) | st.builds(lambda n, t: [t] * n, st.integers(0, 4), st.integers(0, 5))


def numbers(spans: Spans, *shape: int) -> torch.Tensor:
    return torch.randn(spans.total, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def split(spans: Spans, tokens: torch.Tensor) -> list[torch.Tensor]:
    return list(tokens.split(spans.lengths)) if spans.lengths else []


@settings(max_examples=150, deadline=None)
@given(lengths=rows, shape=st.sampled_from([(), (3,), (2, 3)]))
def test_padding_puts_each_row_first_and_zeros_behind_it(lengths, shape):
    spans = Spans(lengths, CPU)
    tokens = numbers(spans, *shape)
    padded = spans.pad(tokens)
    assert padded.shape == (len(lengths), max(lengths, default=0), *shape)
    for row, own, length in zip(padded, split(spans, tokens), lengths, strict=True):
        assert torch.equal(row[:length], own)
        assert not row[length:].any()
    assert torch.equal(spans.flatten(padded), tokens)
    assert spans.inside.shape == padded.shape[:2]
    assert spans.inside.sum(-1).tolist() == lengths
    assert not spans.inside.int().diff(dim=-1).gt(0).any()


@settings(max_examples=100, deadline=None)
@given(lengths=rows)
def test_offsets_counts_and_rows_agree(lengths):
    spans = Spans(lengths, CPU)
    assert spans.offsets.dtype == torch.int32
    assert spans.offsets.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert spans.counts.tolist() == lengths
    assert spans.row_of_token.tolist() == [row for row, length in enumerate(lengths) for _ in range(length)]
    assert (len(spans), spans.total, spans.longest) == (len(lengths), sum(lengths), max(lengths, default=0))
    assert spans.equal == (len(set(lengths)) < 2)


@settings(max_examples=100, deadline=None)
@given(lengths=rows)
def test_rows_are_given_to_their_tokens_and_means_taken_over_them(lengths):
    spans = Spans(lengths, CPU)
    tokens, own = numbers(spans, 3), torch.randn(len(lengths), 3, dtype=torch.float64)
    assert torch.equal(spans.spread(own), own[spans.row_of_token])
    added = tokens + own[spans.row_of_token]
    assert torch.equal(spans.add_rows(tokens, own), added)
    assert torch.equal(spans.add_rows_(tokens.clone(), own), added)
    means = (spans.shares(torch.float64)[:, None] @ spans.pad(tokens)).squeeze(1)
    for mean, mine in zip(means, split(spans, tokens), strict=True):
        torch.testing.assert_close(mean, mine.mean(0) if len(mine) else torch.zeros(3, dtype=torch.float64))


@settings(max_examples=100, deadline=None)
@given(lengths=rows, seed=st.integers(0, 99))
def test_a_row_is_all_true_or_not(lengths, seed):
    spans = Spans(lengths, CPU)
    tokens = torch.rand(spans.total, generator=torch.Generator().manual_seed(seed)) < 0.8
    assert spans.all_by_row(tokens).tolist() == [all(own.tolist()) for own in split(spans, tokens)]


@settings(max_examples=60, deadline=None)
@given(lengths=rows)
def test_gradients_go_to_each_token_once_and_none_to_padding(lengths):
    """The derivative of a padded and weighted sum is the weight at the token's place."""
    spans = Spans(lengths, CPU)
    tokens = numbers(spans, 2).requires_grad_()
    weight = torch.randn(len(lengths), spans.longest, 2, dtype=torch.float64)
    (spans.pad(tokens) * weight).sum().backward()
    assert torch.equal(tokens.grad, spans.flatten(weight))
    own = torch.randn(len(lengths), 2, dtype=torch.float64).requires_grad_()
    spans.spread(own).sum().backward()
    assert torch.equal(own.grad[:, 0], spans.counts.double())


@pytest.mark.parametrize("lengths", [[3, 1, 0], [2, 2]])
def test_what_is_made_in_inference_mode_can_be_trained_with(lengths):
    spans = Spans(lengths, CPU)
    with torch.inference_mode():
        spans.prepare()
        spans.spread(torch.zeros(len(lengths)))
    tokens = torch.randn(spans.total, 2).requires_grad_()
    shares = spans.shares(torch.float32)
    (shares[:, None] @ spans.pad(tokens)).square().sum().backward()
    spans.spread(torch.randn(len(lengths), 2, requires_grad=True)).square().sum().backward()
    assert tokens.grad.isfinite().all()


@pytest.mark.parametrize("lengths", [[3, 1, 0], [2, 2]])
def test_nothing_depends_on_a_number_of_the_device(lengths):
    """Fake tensors have no numbers, and raise when asked for one."""
    with FakeTensorMode():
        spans = Spans(lengths, CPU)
        tokens = torch.randn(spans.total, 2)
        assert spans.flatten(spans.pad(tokens)).shape == tokens.shape
        assert spans.prepare().spread(torch.zeros(len(lengths), 5)).shape == (spans.total, 5)


@pytest.mark.parametrize(("lengths", "most"), [([3, 1, 0], 2), ([2, 2], 0)])
def test_padding_equal_rows_is_no_operation(lengths, most):
    spans = Spans(lengths, CPU).prepare()
    tokens = torch.randn(spans.total, 2)
    with kernels() as count:
        padded = spans.pad(tokens)
    assert len(count.names) <= most
    assert spans.equal == (padded.data_ptr() == tokens.data_ptr())
