"""MemoryAdapter: an exact no-op when fresh, trainable, safe with numbers that are not finite, unchanged by a save."""

import json
import os
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_adapter import MemoryAdapter, MemoryConfig
from mal_adapter.errors import AdapterFormatError, AdapterNotFoundError, AudioMaskError, StateMismatchError
from tests.hosts.builders import WIDTH
from tests.hosts.probes import random_adapter


def make_adapter(seed: int = 0, *, trained: bool = True, **fields) -> MemoryAdapter:
    torch.manual_seed(seed)
    adapter = MemoryAdapter(MemoryConfig(**{"hidden_size": 16, "memory_dim": 8, "num_heads": 2, **fields})).eval()
    if trained:
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return adapter


@pytest.mark.parametrize("depth", [1, 2])
def test_a_fresh_adapter_has_a_residual_of_exactly_zero(depth):
    adapter = make_adapter(trained=False, depth=depth)
    hidden = torch.randn(2, 9, 16)
    state = adapter.write(adapter.initial_state(2), hidden)
    assert torch.equal(adapter.read(state, hidden), torch.zeros_like(hidden))


def test_reading_depends_on_what_was_written():
    adapter = make_adapter()
    now, past = torch.randn(1, 9, 16), torch.randn(1, 9, 16)
    empty = adapter.initial_state()
    assert not torch.allclose(adapter.read(empty, now), adapter.read(adapter.write(empty, past), now))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    depth=st.sampled_from([1, 2]),
    pool=st.booleans(),
    chunk_size=st.sampled_from([1, 5, 64]),
    seed=st.integers(0, 1000),
)
def test_a_padded_batch_equals_the_singles(lengths, depth, pool, chunk_size, seed):
    adapter = make_adapter(seed, depth=depth, pool_utterance=pool, chunk_size=chunk_size).double()
    hidden = torch.randn(len(lengths), max(lengths), 16, dtype=torch.float64)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        state = adapter.write(adapter.initial_state(len(lengths)), hidden, mask)
        residual = adapter.read(state, hidden, mask)
        for i, n in enumerate(lengths):
            alone = adapter.write(adapter.initial_state(), hidden[i : i + 1, :n])
            for batched, single in zip(state.split()[i].weights, alone.weights, strict=True):
                torch.testing.assert_close(batched, single, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(residual[i, :n], adapter.read(alone, hidden[i : i + 1, :n])[0])
    assert torch.equal(residual[~mask], torch.zeros_like(residual[~mask]))
    assert state.tokens.tolist() == lengths


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_write_that_is_not_finite_does_not_change_its_row_and_is_counted(bad):
    adapter = make_adapter()
    hidden = torch.randn(2, 9, 16)
    before = adapter.write(adapter.initial_state(2), hidden)
    poisoned = hidden.clone()
    poisoned[0, 3, 2] = bad
    after = adapter.write(before, poisoned)
    assert after.skipped_writes.tolist() == [1, 0]
    assert after.utterances.tolist() == [1, 2]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(after.weights, before.weights, strict=True))
    clean = adapter.write(before, hidden)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(after.weights, clean.weights, strict=True))
    sum(w.sum() for w in after.weights).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in adapter.parameters())


def test_bad_numbers_outside_the_mask_do_not_matter():
    adapter = make_adapter()
    hidden = torch.randn(1, 9, 16)
    hidden[0, 4] = float("nan")
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[0, 4] = False
    state = adapter.write(adapter.initial_state(), hidden, mask)
    assert state.skipped_writes.tolist() == [0]
    assert adapter.read(state, hidden, mask).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_state_stays_float32_under_a_half_precision_host_and_adapter(dtype):
    adapter = make_adapter()
    hidden = torch.randn(1, 30, 16)
    full = adapter.write(adapter.initial_state(), hidden)
    assert adapter.read(full, hidden.to(dtype)).dtype == dtype
    half = adapter.to(dtype)
    state = half.write(half.initial_state(), hidden.to(dtype))
    assert {t.dtype for t in (*state.weights, *state.momentum)} == {torch.float32}
    for a, b in zip(state.weights, full.weights, strict=True):
        assert (a - b).abs().max() < 0.05 * b.abs().max()


@pytest.mark.parametrize("depth", [1, 2])
def test_every_parameter_learns_from_a_later_utterance(depth):
    adapter = make_adapter(depth=depth).train()
    state = adapter.write(adapter.initial_state(), torch.randn(1, 20, 16))
    state = adapter.write(state, torch.randn(1, 20, 16))
    adapter.read(state, torch.randn(1, 20, 16)).square().sum().backward()
    silent = [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []


@pytest.mark.parametrize("depth", [1, 2])
def test_without_the_token_the_readout_knows_the_past_alone(depth):
    adapter = make_adapter(depth=depth, readout_token=False).train()
    with torch.no_grad():
        adapter.initial[-1].zero_()
    hidden = torch.randn(1, 20, 16)
    empty = adapter.read(adapter.initial_state(), hidden)
    assert torch.equal(empty, empty[:, :1].expand_as(empty))
    state = adapter.write(adapter.initial_state(), hidden)
    state = adapter.write(state, torch.randn(1, 20, 16))
    adapter.read(state, torch.randn(1, 20, 16)).square().sum().backward()
    silent = [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == [f"initial.{depth - 1}"]


def test_wrong_shapes_are_refused_with_both_shapes():
    adapter = make_adapter()
    with pytest.raises(AudioMaskError, match=r"\(1, 4, 15\).*16"):
        adapter.read(adapter.initial_state(), torch.zeros(1, 4, 15))
    with pytest.raises(AudioMaskError, match=r"\(1, 5\).*\(1, 4\)"):
        adapter.read(adapter.initial_state(), torch.zeros(1, 4, 16), torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(StateMismatchError, match="2 dialogues"):
        adapter.write(adapter.initial_state(2), torch.zeros(1, 4, 16))
    with pytest.raises(StateMismatchError, match="another adapter"):
        adapter.check_state(make_adapter(memory_dim=16).initial_state())
    with pytest.raises(StateMismatchError, match="written by adapter"):
        adapter.check_state(make_adapter(seed=1).initial_state())


def test_a_saved_adapter_is_loaded_unchanged_and_in_eval_mode(tmp_path):
    adapter = make_adapter().train()
    adapter.save_pretrained(tmp_path / "adapter")
    loaded = MemoryAdapter.from_pretrained(tmp_path / "adapter")
    assert not loaded.training
    assert loaded.fingerprint() == adapter.fingerprint()
    assert loaded.config == adapter.config
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    half = adapter.to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    assert {p.dtype for p in MemoryAdapter.from_pretrained(tmp_path / "half").parameters()} == {torch.bfloat16}


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda f: (f / "config.json").write_text("{"), "not JSON"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "does not describe"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04pickle"),
            "model.safetensors is not a readable safetensors file",
        ),
        (lambda f: edit_config(f, format_version=99), "99"),
        (lambda f: edit_config(f, layer_idx="4"), "layer_idx"),
        (lambda f: edit_config(f, task={"labels": ["a", "b"], "aliases": 5}), "task is .*aliases"),
        (lambda f: edit_config(f, memory={"hidden_size": 16, "memory_dim": 12, "num_heads": 2}), "do not fit"),
        (lambda f: edit_config(f, memory={"hidden_size": 16, "color": "red"}), "color"),
    ],
)
def test_a_damaged_folder_is_a_typed_error(tmp_path, damage, message):
    make_adapter().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(AdapterFormatError, match=message):
        MemoryAdapter.from_pretrained(tmp_path)


def test_a_save_never_overwrites_another_models_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_audio"}')
    with pytest.raises(AdapterFormatError, match="something other"):
        make_adapter().save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_missing_folder_is_not_looked_up_on_the_hub(tmp_path):
    with pytest.raises(AdapterNotFoundError, match="no folder"):
        MemoryAdapter.from_pretrained(tmp_path / "absent")


@torch.no_grad()
def test_a_causal_read_does_not_depend_on_later_tokens():
    """The first tokens' residual is the same whatever follows; without `causal` the utterance's mean depends on it."""
    adapter = random_adapter()
    torch.manual_seed(0)
    hidden_states = torch.randn(2, 9, WIDTH)
    mask = torch.tensor([[True] * 9, [False] + [True] * 6 + [False] * 2])
    state = adapter.write(adapter.initial_state(2), hidden_states, mask)
    whole = adapter.read(state, hidden_states, mask, causal=True)
    for length in range(1, 10):
        begun = adapter.read(state, hidden_states[:, :length], mask[:, :length], causal=True)
        torch.testing.assert_close(begun, whole[:, :length], rtol=0, atol=1e-5)
    torch.testing.assert_close(whole[0, -1], adapter.read(state, hidden_states, mask)[0, -1], rtol=0, atol=1e-5)
    assert not torch.allclose(whole[:, 1], adapter.read(state, hidden_states, mask)[:, 1], atol=1e-3)


def test_a_save_deletes_temporary_files_older_than_an_hour(tmp_path):
    for name, age_s in (("old", 4000), ("new", 10)):
        (tmp_path / f".saving.{name}").mkdir()
        (tmp_path / f".saving.{name}" / "config.json").write_text("{")
        os.utime(tmp_path / f".saving.{name}", (time.time() - age_s,) * 2)
    make_adapter().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        ".saving.new",
        "README.md",
        "config.json",
        "model.safetensors",
    }


@torch.no_grad()
def test_the_mean_of_a_long_utterance_does_not_overflow_half_precision():
    adapter = MemoryAdapter(MemoryConfig(hidden_size=32, memory_dim=16, num_heads=2)).eval()
    adapter.norm.bias += 40  # 2 000 of them sum up to more than float16 holds, 65 504
    adapter.readout_out.weight.normal_()
    adapter = adapter.half()
    utterance = torch.randn(1, 2000, 32, generator=torch.Generator().manual_seed(0)).half()
    state = adapter.write(adapter.initial_state(), utterance)
    assert state.utterances.tolist() == [1]
    assert adapter.read(state, utterance).isfinite().all()
