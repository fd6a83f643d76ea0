"""The number of tensor operations of a read and a write: launches on a GPU, the cost of a small write on a CPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mal_adapter import MemoryAdapter, MemoryConfig
from mal_adapter.memory.gates import Gates
from mal_adapter.memory.titans import read, write
from tests.benchmarks.timing import kernels

HEADS, D = 2, 8


def problem(depth: int, seq_len: int):
    torch.manual_seed(0)
    shapes = [(D, D)] if depth == 1 else [(D, 2 * D), (2 * D, D)]
    initial = tuple(torch.randn(HEADS, *shape) for shape in shapes)
    state = tuple(torch.zeros(1, HEADS, *shape) for shape in shapes)
    keys, values = torch.randn(2, 1, HEADS, seq_len, D)
    return initial, state, state, keys, values, Gates(*torch.randn(3, 1, HEADS, seq_len)), torch.ones(1, seq_len) > 0


@torch.no_grad()
def operations_of_write(depth: int, chunks: int) -> int:
    arguments = problem(depth, 4 * chunks)
    with kernels() as count:
        write(*arguments, 4)
    return len(count.names)


@torch.no_grad()
def test_a_read_is_three_operations():
    weights = (torch.randn(1, HEADS, D, 2 * D), torch.randn(1, HEADS, 2 * D, D))
    queries = torch.randn(1, HEADS, 5, D)
    with kernels() as count:
        read(weights, queries)
    assert count.names == ["aten.bmm", "aten.silu", "aten.bmm"]


@pytest.mark.parametrize(("depth", "whole", "further"), [(1, 47, 9), (2, 59, 21)])
def test_a_write_is_one_pass_over_the_gates_and_a_few_operations_per_chunk(depth, whole, further):
    one, two, five = (operations_of_write(depth, chunks) for chunks in (1, 2, 5))
    assert one <= whole
    assert two - one <= further
    assert five - two == 3 * (two - one)


@torch.no_grad()
def test_an_adapter_adds_a_fixed_number_to_them():
    adapter = MemoryAdapter(MemoryConfig(hidden_size=16, memory_dim=8, num_heads=2)).eval()
    state, hidden_states = adapter.initial_state(), torch.randn(1, 4, 16)
    with kernels() as count:
        adapter.read(state, hidden_states)
    assert len(count.names) <= 22
    with kernels() as count:
        adapter.write(state, hidden_states)
    assert len(count.names) <= 88


def test_a_read_and_a_write_never_wait_for_a_number_on_the_device():
    """So that a CUDA graph can hold them: fake tensors have no numbers, and raise when asked for one."""
    with FakeTensorMode():
        adapter = MemoryAdapter(MemoryConfig(hidden_size=16, memory_dim=8, num_heads=2))
        state, hidden_states = adapter.initial_state(batch_size=2), torch.randn(2, 4, 16)
        mask = torch.ones(2, 4, dtype=torch.bool)
        assert adapter.read(state, hidden_states, mask).shape == (2, 4, 16)
        with torch.no_grad():
            assert adapter.write(state, hidden_states, mask).weights[0].shape == state.weights[0].shape
        with pytest.raises(DataDependentOutputException):
            mask.any().item()
