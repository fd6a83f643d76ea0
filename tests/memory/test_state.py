"""MemoryState is a value: copies, files and bytes keep every bit, and other files are refused."""

import os
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from mal_adapter import MemoryAdapter, MemoryConfig, MemoryState
from mal_adapter.errors import StateFormatError


@pytest.fixture(scope="module")
def adapter():
    torch.manual_seed(0)
    return MemoryAdapter(MemoryConfig(hidden_size=16, memory_dim=8, num_heads=2)).eval()


@pytest.fixture
def state(adapter):
    with torch.no_grad():
        return adapter.write(adapter.initial_state(3), torch.randn(3, 20, 16))


def test_save_and_load_keep_every_bit_and_the_counters(state, tmp_path):
    state.save(tmp_path / "call.safetensors")
    loaded = MemoryState.load(tmp_path / "call.safetensors")
    assert loaded.equals(state)
    assert loaded.utterances.tolist() == [1, 1, 1]
    assert loaded.tokens.tolist() == [20, 20, 20]
    assert os.listdir(tmp_path) == ["call.safetensors"]


def test_a_failed_save_leaves_the_old_file_and_no_other(state, tmp_path, monkeypatch):
    path = tmp_path / "call.safetensors"
    state.save(path)
    old = path.read_bytes()

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        state.save(path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["call.safetensors"]


def test_a_save_where_no_file_can_be_names_what_was_given(state, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"call\.safetensors: there is no folder .*absent; create it first"):
        state.save(tmp_path / "absent" / "call.safetensors")
    with pytest.raises(IsADirectoryError, match="this is a folder; give a file in it"):
        state.save(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_saved_file_has_the_mode_that_open_would_give(state, tmp_path):
    state.save(tmp_path / "state")
    (tmp_path / "plain").write_bytes(b"")
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_clone_shares_no_memory(state):
    clone = state.clone()
    clone.weights[0].add_(1)
    clone.tokens.add_(1)
    assert not clone.equals(state)
    assert state.tokens.tolist() == [20, 20, 20]


def test_stack_is_the_inverse_of_split(state):
    assert MemoryState.stack(state.split()).equals(state)
    assert state.rows(torch.tensor([2, 0])).split()[1].equals(state.split()[0])


def test_nbytes_is_what_a_session_costs(state):
    assert state.nbytes == 3 * (2 * 4 * 2 * (4 * 8 + 8 * 4) + 3 * 8)


@settings(max_examples=100, deadline=None)
@given(cut=st.floats(0, 1), flip=st.integers(0, 2**31), bit=st.integers(0, 7))
def test_damaged_bytes_are_a_typed_error_or_another_state(adapter, cut, flip, bit):
    data = bytearray(adapter.initial_state(1).to_bytes())
    truncated = bytes(data[: int(cut * (len(data) - 1))])
    with pytest.raises(StateFormatError):
        MemoryState.from_bytes(truncated)
    data[flip % len(data)] ^= 1 << bit
    try:
        loaded = MemoryState.from_bytes(bytes(data))
    except StateFormatError:
        return
    assert all(w.isfinite().all() for w in loaded.weights)


def test_other_safetensors_files_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(save({"weight": torch.zeros(2)}))
    with pytest.raises(StateFormatError, match="not a memory state"):
        MemoryState.load(tmp_path / "model.safetensors")


def test_a_newer_format_is_refused(state):
    data = state.to_bytes().replace(b'"format_version":"1"', b'"format_version":"9"')
    with pytest.raises(StateFormatError, match="'9'"):
        MemoryState.from_bytes(data)


def test_a_state_that_is_not_finite_is_refused(state):
    state.weights[0][0, 0, 0, 0] = float("nan")
    with pytest.raises(StateFormatError, match="finite"):
        MemoryState.from_bytes(state.to_bytes())
