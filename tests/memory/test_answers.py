"""A memory that keeps the host's answers: a few numbers beside it, zero in the beginning, one row per dialogue."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_adapter import MemoryAdapter, MemoryConfig, MemoryState
from mal_adapter.errors import ConfigError, StateMismatchError
from mal_adapter.memory.ensemble import MemoryEnsemble

CONFIG = MemoryConfig(hidden_size=16, memory_dim=8, num_heads=2, num_labels=3)


def trained(seed=0, **changes):
    """An adapter whose read-out is not zero."""
    torch.manual_seed(seed)
    adapter = MemoryAdapter(MemoryConfig(**{**CONFIG.to_dict(), **changes})).double().eval()
    with torch.no_grad():
        adapter.readout_out.weight.normal_()
        adapter.answers.out_proj.weight.normal_()
        adapter.answers.decay.copy_(torch.tensor([-0.3, 1.1]))
    return adapter


def by_hand(adapter, past):
    """b and the count's share per time scale, from the list of past probabilities, as the docstring's equations say."""
    rows = []
    for decay in adapter.answers.decay.sigmoid().tolist():
        weights = [decay ** (len(past) - 1 - n) for n in range(len(past))]
        count = sum(weights)
        sums = sum((3 * w * p for w, p in zip(weights, past, strict=True)), torch.zeros(3, dtype=torch.float64))
        rows.append(torch.cat(((sums - count) / (count + 1), torch.tensor([count / (count + 1)]))))
    return torch.stack(rows)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 12), st.integers(0, 2**32 - 1))
def test_the_means_are_those_of_the_equations(turns, seed):
    adapter = trained()
    past = list(torch.rand(turns, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).softmax(-1))
    state = adapter.initial_state()
    for probabilities in past:
        state = adapter.write_answers(state, probabilities[None])
    means = adapter.answers.means(state.answers)[0]
    torch.testing.assert_close(means, by_hand(adapter, past))
    assert means.abs().max() <= 3  # also after many answers


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(0, 2**32 - 1))
def test_a_batch_equals_single_dialogues(lengths, seed):
    adapter, generator = trained(), torch.Generator().manual_seed(seed)
    singles = []
    for turns in lengths:
        state = adapter.initial_state()
        for _ in range(turns):
            row = torch.rand(1, 3, dtype=torch.float64, generator=generator).softmax(-1)
            state = adapter.write_answers(state, row)
        singles.append(state)
    tokens = torch.randn(len(lengths), 4, 16, dtype=torch.float64, generator=generator)
    together = MemoryState.stack(singles)
    expected = torch.cat([adapter.read(s, t[None]) for s, t in zip(singles, tokens, strict=True)])
    torch.testing.assert_close(adapter.read(together, tokens), expected)
    new = torch.rand(len(lengths), 3, dtype=torch.float64, generator=generator).softmax(-1)
    after = adapter.write_answers(together, new).split()
    for single, row, own in zip(singles, new, after, strict=True):
        torch.testing.assert_close(own.answers, adapter.write_answers(single, row[None]).answers)


def test_nothing_is_added_before_the_first_answer_and_by_a_fresh_adapter():
    adapter, tokens = trained(), torch.randn(1, 4, 16, dtype=torch.float64)
    plain = MemoryAdapter(MemoryConfig(**{**CONFIG.to_dict(), "num_labels": None}))
    plain.double().eval().load_state_dict({k: v for k, v in adapter.state_dict().items() if "answers" not in k})
    assert torch.equal(adapter.read(adapter.initial_state(), tokens), plain.read(plain.initial_state(), tokens))
    state = adapter.write_answers(adapter.initial_state(), torch.tensor([[0.8, 0.1, 0.1]]))
    assert not torch.equal(adapter.read(state, tokens), plain.read(plain.initial_state(), tokens))
    fresh = MemoryAdapter(CONFIG).eval()
    state = fresh.write_answers(fresh.initial_state(), torch.tensor([[0.8, 0.1, 0.1]]))
    assert fresh.is_fresh
    assert not fresh.read(state, tokens.float()).any()


def test_tokens_that_are_not_audio_get_nothing():
    adapter = trained()
    state = adapter.write_answers(adapter.initial_state(), torch.tensor([[0.8, 0.1, 0.1]]))
    mask = torch.tensor([[True, False, True, False]])
    residual = adapter.read(state, torch.randn(1, 4, 16, dtype=torch.float64), mask)
    assert residual[0, [0, 2]].any(-1).all()
    assert not residual[0, [1, 3]].any()


def test_an_answer_that_is_not_finite_leaves_its_dialogue_alone():
    adapter = trained()
    state = adapter.write_answers(adapter.initial_state(2), torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.2, 0.6]]))
    after = adapter.write_answers(state, torch.tensor([[torch.nan] * 3, [0.5, 0.3, 0.2]]))
    assert torch.equal(after.answers[0], state.answers[0])
    assert not torch.equal(after.answers[1], state.answers[1])


def test_gradients_reach_the_decays_and_not_the_probabilities():
    adapter = trained().train()
    probabilities = torch.tensor([[0.8, 0.1, 0.1]], dtype=torch.float64, requires_grad=True)
    state = adapter.write_answers(adapter.initial_state(), probabilities)
    state = adapter.write_answers(state, probabilities)
    adapter.read(state, torch.randn(1, 4, 16, dtype=torch.float64)).sum().backward()
    assert probabilities.grad is None
    assert adapter.answers.decay.grad.all()
    assert adapter.answers.out_proj.weight.grad.any()


@pytest.mark.parametrize("shape", [(1, 2), (2, 3)])
def test_other_shapes_are_refused(shape):
    adapter = trained()
    with pytest.raises(ConfigError, match=r"\(dialogues, labels\)"):
        adapter.write_answers(adapter.initial_state(), torch.rand(shape))


def test_a_control_and_a_memory_without_answers_keep_none():
    for changes in ({"update": "none"}, {"num_labels": None}):
        adapter = MemoryAdapter(MemoryConfig(**{**CONFIG.to_dict(), **changes})).eval()
        state = adapter.initial_state()
        assert adapter.write_answers(state, torch.tensor([[0.8, 0.1, 0.1]])) is state


def test_states_of_other_labels_are_refused():
    three, none, four = (
        trained(),
        MemoryAdapter(MemoryConfig(**{**CONFIG.to_dict(), "num_labels": None})),
        trained(num_labels=4),
    )
    for adapter, other in ((three, none.double().eval()), (none.double().eval(), three), (three, four)):
        state = other.initial_state()
        with pytest.raises(StateMismatchError, match="answers"):
            adapter.check_state(state)


def test_members_keep_their_own_answers():
    both = MemoryEnsemble([trained(0), trained(1)])
    before = both.initial_state(2)
    parts = both.split(before)
    rows = [torch.rand(2, 3, dtype=torch.float64).softmax(-1) for _ in parts]
    after = [m.write_answers(p, row) for m, p, row in zip(both.members, parts, rows, strict=True)]
    state = both.join(before, after)
    both.check_state(state)
    for part, own in zip(both.split(MemoryState.from_bytes(state.to_bytes())), after, strict=True):
        assert torch.equal(part.answers, own.answers)


def test_a_memory_of_answers_alone_writes_nothing_else():
    adapter = trained(update="answers")
    state = adapter.write(adapter.initial_state(), torch.randn(1, 4, 16, dtype=torch.float64))
    assert not any(layer.any() for layer in (*state.weights, *state.momentum))
    assert adapter.write_answers(state, torch.tensor([[0.8, 0.1, 0.1]])).answers.any()
    with pytest.raises(ConfigError, match="num_labels"):
        trained(update="answers", num_labels=None)
