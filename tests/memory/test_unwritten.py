"""The control without a past: the parameters of the Titans memory, and reads that no utterance changes."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_adapter import MemoryAdapter, MemoryConfig, MemoryState
from mal_adapter.errors import StateMismatchError

SMALL = MemoryConfig(hidden_size=12, memory_dim=8, num_heads=2, chunk_size=4)


def pair(**changes):
    """The memory and its control, with the same random parameters."""
    adapters = []
    for update in ("titans", "none"):
        torch.manual_seed(0)
        adapter = MemoryAdapter(dataclasses.replace(SMALL, update=update, **changes)).eval()
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        adapters.append(adapter)
    return adapters


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    utterances=st.integers(1, 4),
    changes=st.fixed_dictionaries({"depth": st.sampled_from([1, 2]), "pool_utterance": st.booleans()}),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
@torch.no_grad()
def test_it_always_reads_what_the_memory_reads_at_the_start(lengths, utterances, changes, seed):
    memory, control = pair(**changes)
    random = torch.Generator().manual_seed(seed)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    states = [adapter.initial_state(len(lengths)) for adapter in (memory, control)]
    first = states[0]
    for _ in range(utterances):
        hidden_states = torch.randn(len(lengths), 9, 12, generator=random)
        expected = memory.read(first, hidden_states, mask)
        assert torch.equal(control.read(states[1], hidden_states, mask), expected)
        states = [a.write(s, hidden_states, mask) for a, s in zip((memory, control), states, strict=True)]
    for name in ("utterances", "tokens", "skipped_writes"):
        assert torch.equal(getattr(states[1], name), getattr(states[0], name))
    assert not any(layer.any() for layer in (*states[1].weights, *states[1].momentum))


def test_it_starts_with_the_parameters_of_the_memory_and_has_a_fingerprint_of_its_own():
    memory, control = pair()
    for (name, ours), (other, theirs) in zip(memory.named_parameters(), control.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs)
    assert control.fingerprint() != memory.fingerprint()
    with pytest.raises(StateMismatchError):
        control.check_state(memory.initial_state())


def test_files_and_states_work_as_with_titans(tmp_path):
    _, control = pair()
    control.save_pretrained(tmp_path)
    loaded = MemoryAdapter.from_pretrained(tmp_path)
    assert (loaded.config.update, loaded.fingerprint()) == ("none", control.fingerprint())
    state = control.write(control.initial_state(), torch.randn(1, 4, 12))
    assert MemoryState.from_bytes(state.to_bytes()).equals(state)
    loaded.check_state(state)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_audio_that_is_not_finite_is_skipped_and_counted_as_in_a_memory(dtype, training):
    for adapter in pair():
        adapter = adapter.to(dtype).train(training)
        hidden_states = torch.randn(2, 4, 12, dtype=dtype)
        hidden_states[1, 2, 3] = torch.nan
        state = adapter.write(adapter.initial_state(2), hidden_states)
        assert (state.utterances.tolist(), state.skipped_writes.tolist()) == ([1, 0], [0, 1])
        assert all(layer.isfinite().all() for layer in state.weights)


def test_every_parameter_of_a_read_is_trained():
    _, control = pair()
    control.train()
    state = control.initial_state()
    for _ in range(2):
        hidden_states = torch.randn(1, 4, 12)
        residual = control.read(state, hidden_states)
        state = control.write(state, hidden_states)
    residual.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in control.parameters())
