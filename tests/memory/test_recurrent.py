"""The simple memories: what they compute, and that everything else is the same as with the Titans update."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_adapter import MemoryAdapter, MemoryConfig, MemoryState
from mal_adapter.errors import ConfigError, StateMismatchError
from mal_adapter.memory.adapter import RULES
from mal_adapter.memory.config import UPDATES as ALL_UPDATES

SMALL = MemoryConfig(hidden_size=12, memory_dim=8, num_heads=2)
UPDATES = ["running_mean", "gru"]


def make(update, **changes):
    torch.manual_seed(0)
    adapter = MemoryAdapter(dataclasses.replace(SMALL, update=update, **changes)).double().eval()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return adapter


@given(utterances=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_slow_running_mean_is_the_mean_of_the_utterances(utterances, seed):
    adapter = make("running_mean", pool_utterance=False)
    with torch.no_grad():
        adapter.recurrence.rate.fill_(-40.0)  # never exponential
    random = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(utterances, 1, 5, 12, generator=random, dtype=torch.float64)
    state = adapter.initial_state()
    for utterance in hidden_states:
        state = adapter.write(state, utterance)
    value = adapter.in_proj(adapter.norm(hidden_states))[..., 24:32].mean((0, 2))
    memory = (adapter.initial[0] + state.weights[0]).flatten(1)
    assert torch.allclose(memory, value, rtol=1e-12, atol=1e-12)
    assert state.utterances.item() == utterances


def test_the_gru_equals_that_of_torch():
    adapter = make("gru", pool_utterance=False)
    hidden_states = torch.randn(2, 5, 12, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    state = adapter.write(adapter.initial_state(2), hidden_states, mask)
    value = adapter.in_proj(adapter.norm(hidden_states))[..., 24:32]
    means = torch.stack([value[0].mean(0), value[1, :2].mean(0)])
    expected = adapter.recurrence.cell(means, adapter.initial[0].flatten()[None].expand(2, -1))
    assert torch.allclose((adapter.initial[0] + state.weights[0]).flatten(1), expected, atol=1e-12)


@pytest.mark.parametrize("update", UPDATES)
def test_a_batch_equals_singles_and_padding_has_no_effect(update):
    adapter = make(update)
    hidden_states = torch.randn(3, 7, 12, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([7, 3, 0])[:, None]
    together = adapter.initial_state(3)
    for _ in range(2):
        together = adapter.write(together, hidden_states, mask)
    for row, length in enumerate((7, 3, 0)):
        alone = adapter.initial_state()
        for _ in range(2):
            alone = adapter.write(alone, hidden_states[row : row + 1, :length])
        assert torch.allclose(together.weights[0][row], alone.weights[0][0], atol=1e-12)
        assert together.utterances[row] == alone.utterances[0]
    read = adapter.read(together, hidden_states, mask)
    assert torch.equal(read[~mask], torch.zeros_like(read[~mask]))
    assert not torch.equal(read[0], adapter.read(adapter.initial_state(3), hidden_states, mask)[0])


@pytest.mark.parametrize("update", UPDATES)
def test_files_and_states_work_as_with_titans(update, tmp_path):
    adapter = make(update)
    adapter.save_pretrained(tmp_path)
    loaded = MemoryAdapter.from_pretrained(tmp_path)
    assert loaded.config.update == update
    assert loaded.fingerprint() == adapter.fingerprint()
    state = adapter.write(adapter.initial_state(), torch.randn(1, 4, 12, dtype=torch.float64))
    assert MemoryState.from_bytes(state.to_bytes()).equals(state)
    loaded.check_state(state)
    with pytest.raises(StateMismatchError):
        make("titans").check_state(state)


@pytest.mark.parametrize("update", UPDATES)
def test_half_precision_parameters_have_a_float32_state_and_skip_a_write_that_is_not_finite(update):
    adapter = make(update).to(torch.bfloat16)
    hidden_states = torch.randn(1, 4, 12, dtype=torch.bfloat16)
    state = adapter.write(adapter.initial_state(), hidden_states)
    assert state.weights[0].dtype == torch.float32
    broken = adapter.write(state, hidden_states * torch.nan)
    assert torch.equal(broken.weights[0], state.weights[0])
    assert (broken.utterances.item(), broken.skipped_writes.item()) == (1, 1)


@pytest.mark.parametrize("update", UPDATES)
def test_gradients_flow_through_earlier_utterances(update):
    adapter = make(update).train()
    if update == "running_mean":
        with torch.no_grad():
            adapter.recurrence.rate.fill_(0.0)  # r = 1/2, in force from the third utterance on
    state = adapter.initial_state()
    for _ in range(3):
        state = adapter.write(state, torch.randn(1, 4, 12, dtype=torch.float64))
    adapter.read(state, torch.randn(1, 4, 12, dtype=torch.float64)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.recurrence.parameters())


def test_each_update_has_a_rule_and_only_a_rule_with_parameters_has_keys():
    assert RULES.keys() == set(ALL_UPDATES)
    made = {update: MemoryAdapter(dataclasses.replace(SMALL, update=update, num_labels=3)) for update in ALL_UPDATES}
    keys = {update: {k for k in one.state_dict() if k.startswith("recurrence.")} for update, one in made.items()}
    cell = {f"recurrence.cell.{name}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    assert keys == {"titans": set(), "running_mean": {"recurrence.rate"}, "gru": cell, "answers": set(), "none": set()}


def test_an_unknown_update_is_refused():
    with pytest.raises(ConfigError, match="running_mean"):
        dataclasses.replace(SMALL, update="lstm")


def test_fingerprints_from_before_the_field_are_unchanged():
    # What this adapter's states were saved with before `update` was a field.
    torch.manual_seed(0)
    adapter = MemoryAdapter(SMALL)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(0.5)
    assert adapter.fingerprint() == "932afe4609edf989"
