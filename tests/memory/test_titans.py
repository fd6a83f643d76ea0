"""The closed form against the recurrence, token by token, and stability for every input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mal_adapter.memory.gates import Gates
from mal_adapter.memory.reference import write_by_token
from mal_adapter.memory.titans import read, write

DOUBLE = torch.float64
SMALL = settings(max_examples=60, deadline=None)


def random_problem(
    seed: int, *, batch: int, heads: int, seq_len: int, depth: int, dim: int = 3, gate_spread: float = 2.0, dtype=DOUBLE
):
    """Arguments of `write` up to the mask; keys are not of unit length, where the trust region has its kink."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=DOUBLE).to(dtype)

    shapes = [(dim, dim)] if depth == 1 else [(dim, 2 * dim), (2 * dim, dim)]
    initial = tuple(0.5 * normal(heads, *shape) for shape in shapes)
    weights = tuple(0.3 * normal(batch, heads, *shape) for shape in shapes)
    momentum = tuple(0.1 * normal(batch, heads, *shape) for shape in shapes)
    keys = torch.nn.functional.normalize(normal(batch, heads, seq_len, dim), dim=-1)
    keys = keys * (0.7 + 0.2 * torch.rand(batch, heads, seq_len, 1, generator=generator, dtype=DOUBLE)).to(dtype)
    gates = Gates(*(gate_spread * normal(batch, heads, seq_len) for _ in range(3)))
    return initial, weights, momentum, keys, normal(batch, heads, seq_len, dim), gates


def tensors(nested) -> list[Tensor]:
    return [nested] if isinstance(nested, Tensor) else [t for item in nested for t in tensors(item)]


def relative_error(ours, theirs) -> float:
    scale = max(t.abs().max().item() for t in tensors(theirs))
    return max((a - b).abs().max().item() for a, b in zip(tensors(ours), tensors(theirs), strict=True)) / scale


problems = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "batch": st.integers(1, 2),
        "heads": st.integers(1, 2),
        "seq_len": st.integers(1, 9),
        "depth": st.sampled_from([1, 2]),
        "gate_spread": st.sampled_from([0.1, 2.0, 30.0]),
    }
)


def random_mask(problem: dict, seed: int) -> Tensor:
    return torch.rand(problem["batch"], problem["seq_len"], generator=torch.Generator().manual_seed(seed)) < 0.7


@SMALL
@given(problem=problems, mask_seed=st.integers(0, 2**31), chunk_size=st.sampled_from([1, 2, 4, 64]))
def test_closed_form_equals_the_recurrence_in_values_and_gradients(problem, mask_seed, chunk_size):
    arguments = random_problem(**problem)
    leaves = [t.requires_grad_() for t in tensors(arguments)]
    mask = random_mask(problem, mask_seed)
    mask[0, 0] = True
    closed = write(*arguments, mask, chunk_size)
    by_token = write_by_token(*arguments, mask, chunk_size)
    assert relative_error(closed, by_token) < 1e-12

    cotangents = [torch.randn_like(t) for t in tensors(by_token)]
    ours = torch.autograd.grad(tensors(closed), leaves, cotangents, materialize_grads=True)
    theirs = torch.autograd.grad(tensors(by_token), leaves, cotangents, materialize_grads=True)
    assert relative_error(list(ours), list(theirs)) < 1e-12


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("scale", [0.1, 3.0])  # inside the trust region, and at its edge
def test_the_written_out_derivative_passes_gradcheck(depth, scale):
    *arguments, gates = random_problem(3, batch=2, heads=2, seq_len=5, depth=depth, dim=2, gate_spread=1.0)
    gates = Gates(gates.step + scale, gates.momentum, gates.forget)
    leaves = [t.requires_grad_() for t in tensors((arguments, gates))]
    mask = torch.tensor([[True] * 5, [True, False, True, True, False]])

    def flat(*leaves: Tensor) -> tuple[Tensor, ...]:
        initial, weights, momentum = (leaves[i * depth : (i + 1) * depth] for i in range(3))
        keys, values, *gates = leaves[3 * depth :]
        return tuple(tensors(write(initial, weights, momentum, keys, values, Gates(*gates), mask, 2)))

    assert torch.autograd.gradcheck(flat, leaves, atol=1e-7)


def test_rows_processed_in_slabs_equal_all_rows_at_once(monkeypatch):
    problem = random_problem(1, batch=5, heads=2, seq_len=7, depth=2)
    leaves = [t.requires_grad_() for t in tensors(problem)]
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.8
    together = tensors(write(*problem, mask, 3))
    whole = torch.autograd.grad(sum(t.square().sum() for t in together), leaves)
    monkeypatch.setattr(
        "mal_adapter.memory.titans._SLAB", 2 * (2 * 3 * 6)
    )  # two rows of two heads, three tokens, six units
    slabs = tensors(write(*problem, mask, 3))
    assert relative_error(slabs, together) < 1e-14
    assert relative_error(torch.autograd.grad(sum(t.square().sum() for t in slabs), leaves), whole) < 1e-13
    with torch.no_grad():
        assert relative_error(write(*problem, mask, 3), together) < 1e-14


@SMALL
@given(problem=problems, mask_seed=st.integers(0, 2**31), chunk_size=st.sampled_from([1, 3, 64]))
def test_in_place_inference_equals_the_differentiable_path_and_leaves_its_arguments_alone(
    problem, mask_seed, chunk_size
):
    arguments = random_problem(**problem)
    before = [t.clone() for t in tensors(arguments)]
    mask = random_mask(problem, mask_seed)
    with torch.no_grad():
        in_place = write(*arguments, mask, chunk_size)
    assert all(torch.equal(a, b) for a, b in zip(tensors(arguments), before, strict=True))
    for t in tensors(arguments):
        t.requires_grad_()
    assert relative_error(in_place, write(*arguments, mask, chunk_size)) < 1e-12


@SMALL
@given(problem=problems, mask_seed=st.integers(0, 2**31), chunk_size=st.sampled_from([1, 3, 64]))
def test_a_padded_batch_equals_its_rows_alone(problem, mask_seed, chunk_size):
    initial, weights, momentum, keys, values, gates = random_problem(**problem)
    lengths = torch.randint(1, keys.shape[2] + 1, (keys.shape[0],), generator=torch.Generator().manual_seed(mask_seed))
    mask = torch.arange(keys.shape[2]) < lengths[:, None]
    together = write(initial, weights, momentum, keys, values, gates, mask, chunk_size)
    for i, n in enumerate(lengths.tolist()):
        alone = write(
            initial,
            tuple(w[i : i + 1] for w in weights),
            tuple(s[i : i + 1] for s in momentum),
            keys[i : i + 1, :, :n],
            values[i : i + 1, :, :n],
            Gates(*(g[i : i + 1, :, :n] for g in gates)),
            mask[i : i + 1, :n],
            chunk_size,
        )
        assert relative_error([t[i : i + 1] for t in tensors(together)], tensors(alone)) < 1e-12


@SMALL
@given(problem=problems, garbage=st.sampled_from([0.0, 1e300, -1e300]))
def test_masked_tokens_have_no_effect(problem, garbage):
    initial, weights, momentum, keys, values, gates = random_problem(**problem)
    mask = random_mask(problem, problem["seed"])
    clean = write(initial, weights, momentum, keys, values, gates, mask, 4)
    hidden = ~mask[:, None, :, None]
    dirty = write(
        initial,
        weights,
        momentum,
        keys.masked_fill(hidden, garbage),
        values.masked_fill(hidden, garbage),
        gates,
        mask,
        4,
    )
    assert all(torch.equal(a, b) for a, b in zip(tensors(clean), tensors(dirty), strict=True))
    nothing = write(initial, weights, momentum, keys, values, gates, torch.zeros_like(mask), 4)
    assert relative_error(nothing, (weights, momentum)) < 1e-15


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("momentum_logit", [-6.0, 0.0, 6.0, 60.0])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("keys_alike", [True, False])
def test_ten_thousand_tokens_of_any_scale_leave_a_finite_memory(depth, momentum_logit, scale, keys_alike):
    """Identical keys, open step gates and long momentum are what diverges without the trust region."""
    initial, weights, _, keys, values, gates = random_problem(
        0, batch=1, heads=1, seq_len=10_000, depth=depth, dim=8, dtype=torch.float32
    )
    momentum = tuple(torch.zeros_like(w) for w in weights)  # without friction, an initial momentum would never end
    keys = keys[..., :1, :].expand_as(keys) if keys_alike else keys
    gates = Gates(gates.step + 5, torch.full_like(gates.momentum, momentum_logit), gates.forget - 8)
    mask = torch.ones(1, 10_000, dtype=torch.bool)
    with torch.no_grad():
        weights, momentum = write(initial, weights, momentum, scale * keys, scale * values, gates, mask, 64)
        answer = read(tuple(w0 + w for w0, w in zip(initial, weights, strict=True)), scale * keys[..., -64:, :])
    assert all(t.isfinite().all() for t in (*weights, *momentum))
    # stable is more than finite: answers are of the size of the written values
    assert answer.abs().max() <= 30 * scale * max(1.0, values.abs().max().item(), scale)


def test_without_the_trust_region_that_input_diverges(monkeypatch):
    initial, weights, momentum, keys, values, gates = random_problem(
        0, batch=1, heads=1, seq_len=10_000, depth=2, dim=8, dtype=torch.float32
    )
    gates = Gates(gates.step + 5, gates.momentum, gates.forget - 8)
    monkeypatch.setattr("mal_adapter.memory.chunk._bound", lambda totals: torch.ones_like(totals[..., :1]))
    mask = torch.ones(1, 10_000, dtype=torch.bool)
    weights, _ = write(initial, weights, momentum, keys[..., :1, :].expand_as(keys), values, gates, mask, 64)
    assert not all(w.isfinite().all() for w in weights)


@pytest.mark.parametrize("depth", [1, 2])
def test_float32_drifts_little_from_float64_over_500_utterances(depth):
    states = {}
    initial, zero, _, *_ = random_problem(1, batch=1, heads=2, seq_len=1, depth=depth, dim=8)
    for dtype in (torch.float32, DOUBLE):
        weights = tuple(torch.zeros_like(w, dtype=dtype) for w in zero)
        momentum = weights
        cast = tuple(w0.to(dtype) for w0 in initial)
        for seed in range(500):
            *_, keys, values, gates = random_problem(seed, batch=1, heads=2, seq_len=40, depth=depth, dim=8)
            gates = Gates(gates.step - 4, gates.momentum, gates.forget - 8)
            with torch.no_grad():
                weights, momentum = write(
                    cast, weights, momentum, keys.to(dtype), values.to(dtype), gates, torch.ones(1, 40).bool(), 16
                )
        states[dtype] = tuple(w.double() for w in weights)
    assert relative_error(states[torch.float32], states[DOUBLE]) < 5e-6


def test_after_a_full_step_the_memory_answers_with_the_value():
    key = torch.tensor([[[[0.6, 0.8]]]])
    value = torch.tensor([[[[3.0, -1.0]]]])
    open_step = Gates(*(torch.full((1, 1, 1), logit) for logit in (50.0, -50.0, -50.0)))
    empty = (torch.zeros(1, 1, 2, 2),)
    (weights,), _ = write((torch.zeros(1, 2, 2),), empty, empty, key, value, open_step, torch.ones(1, 1).bool(), 64)
    torch.testing.assert_close(read((weights,), key), value)
