"""Every kernel against float64 without kernels: values and gradients, in Triton's interpreter, for drawn shapes.

On a machine with a GPU the kernels are compiled, and test_on_a_device.py checks them.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.memory.fused.interpreter import INTERPRETED
from tests.memory.fused.problems import STABLE, Problem, assert_close, grads, read_row_by_row, write_row_by_row

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="no Triton, or one with a GPU")

FEW = settings(max_examples=10, deadline=None)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)

# Derivatives with respect to keys, values, queries and gates are rounded to their dtype once, at the end: by half of
# the distance of two numbers. The other half is for float32, which loses most where gates almost cancel.
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}

# Blocks are powers of two: sizes at their edges and between, and for depth 2 both kernels of a write.
SIZES = st.sampled_from(
    [(16, 16), (16, 24), (16, 40), (16, 144), (24, 48), (32, 64), (40, 200), (64, 128), (96, 192), (128, 256)]
)


@st.composite
def problems(draw: st.DrawFn) -> dict:
    depth = draw(st.sampled_from([1, 2]))
    d, h = draw(SIZES)
    chunk_size = draw(st.one_of(st.integers(1, 20), st.sampled_from([32, 33, 64, 100, 128])))
    # At most five chunks in all: the interpreter takes its time for each.
    most = min(2 * chunk_size + 1, 150)
    lengths = draw(st.lists(st.one_of(st.just(0), st.integers(1, most)), min_size=1, max_size=3).filter(any))
    return {
        "seed": draw(st.integers(0, 2**31)),
        "lengths": lengths,
        "heads": 1 if d > 32 else draw(st.integers(1, 2)),
        "d": d,
        "h": h,
        "depth": depth,
        "chunk_size": chunk_size,
        "gates": draw(st.sampled_from([STABLE, (-4.0, 0.0, -8.0), (0.0, 0.0, -4.0), (3.0, 3.0, -3.0)])),
        "spread": draw(st.sampled_from([0.5, 3.0])),
        "masked": draw(st.one_of(st.none(), st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=3, max_size=3))),
    }


def drawn(problem: dict, dtype: torch.dtype = torch.float32) -> Problem:
    masked = problem["masked"]
    return Problem.draw(**{**problem, "masked": masked and masked[: len(problem["lengths"])]}, dtype=dtype)


@FEW
@given(problem=problems())
def test_a_write_without_gradients_equals_float64(problem):
    given_ = drawn(problem)
    before = [t.clone() for t in given_.leaves()]
    with torch.no_grad():
        written = given_.write()
    assert all(t.dtype == torch.float32 and not t.requires_grad for t in written)
    assert_close(written, write_row_by_row(given_.for_gradients(torch.float64)))
    for old, new in zip(before, given_.leaves(), strict=True):
        assert torch.equal(old.nan_to_num(), new.nan_to_num())


@DTYPES
@settings(FEW, max_examples=6)
@given(problem=problems())
def test_a_write_and_its_derivative_equal_float64(dtype, problem):
    ours = drawn(problem, dtype).for_gradients()
    exact = ours.for_gradients(torch.float64)
    written, want = ours.write(), write_row_by_row(exact)
    assert_close(written, want)
    assert_close(grads(written, ours, problem["seed"]), grads(want, exact, problem["seed"]), TOLERANCE[dtype])


@DTYPES
@settings(FEW, max_examples=4)
@given(problem=problems(), normalize=st.booleans())
def test_a_read_and_its_derivative_equal_float64(dtype, problem, normalize):
    ours = drawn({**problem, "masked": None}, dtype).for_gradients()
    exact = ours.for_gradients(torch.float64)
    answers, want = ours.read(normalize), read_row_by_row(exact, normalize)
    assert answers.dtype == torch.float32
    assert_close([answers], [want])
    assert_close(grads([answers], ours, problem["seed"]), grads([want], exact, problem["seed"]), TOLERANCE[dtype])
