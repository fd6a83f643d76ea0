"""The kernels as operators of PyTorch: schemas, shapes without data, autograd, and a graph without a break."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mal_adapter.memory import fused
from tests.memory.fused.interpreter import INTERPRETED
from tests.memory.fused.problems import Problem, assert_close, grads

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="no Triton, or one with a GPU")

SIZES = [{"depth": 1}, {"depth": 2}, {"depth": 2, "d": 80, "h": 80}, {"depth": 2, "h": 144, "dtype": torch.bfloat16}]


def write_arguments(problem: Problem, save: bool) -> tuple:
    """Of titans_write."""
    state = [list(tensors) for tensors in problem[:3]]
    rows = (problem.spans.offsets, problem.valid, problem.chunk_size, max(problem.lengths))
    return *state, problem.keys, problem.values, *problem.gates, *rows, save


def read_arguments(problem: Problem) -> tuple:
    """Of titans_read."""
    rows = (problem.spans.offsets, max(problem.lengths))
    return list(problem.initial), list(problem.weights), problem.keys, *rows, True


@pytest.mark.parametrize("sizes", [{"depth": 1}, {"depth": 2, "h": 16}], ids=str)
def test_operators_pass_torchs_own_checks(sizes):
    # Seventeen tokens of one row are two chunks in two slots. A slot without a chunk holds anything, and is compared.
    problem = Problem.draw(lengths=(17,), **sizes).for_gradients()
    torch.library.opcheck(torch.ops.mal_adapter.titans_write.default, write_arguments(problem, save=True))
    torch.library.opcheck(torch.ops.mal_adapter.titans_read.default, read_arguments(problem))
    for_inference = Problem.draw(lengths=(17,), masked=(0.3,), **sizes)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.mal_adapter.titans_write.default, write_arguments(for_inference, save=False), test_utils=checks
    )


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_shapes_without_data_are_those_of_the_kernels(sizes, save):
    problem = Problem.draw(lengths=(20, 0, 5), **sizes)
    with torch.no_grad():
        real = [*torch.ops.mal_adapter.titans_write(*write_arguments(problem, save))]
        real += [torch.ops.mal_adapter.titans_read(*read_arguments(problem))]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake_problem = problem.with_leaves([mode.from_tensor(t) for t in problem.leaves()])
        fake = [*torch.ops.mal_adapter.titans_write(*write_arguments(fake_problem, save))]
        fake += [torch.ops.mal_adapter.titans_read(*read_arguments(fake_problem))]
    assert [(t.shape, t.dtype, t.stride()) for t in fake] == [(t.shape, t.dtype, t.stride()) for t in real]


def test_a_compiled_function_holds_reads_and_writes_without_a_break():
    problem = Problem.draw(lengths=(20, 9), masked=(0.3, 0)).for_gradients()
    spans = problem.spans
    assert len(spans.offsets) == 3  # made before the graph, as the prompt's hook does

    def step(problem: Problem) -> list[torch.Tensor]:
        weights, momentum = fused.write(*problem[:6], spans, problem.valid, problem.chunk_size)
        queries = problem.values.detach()  # no NaN there but at masked tokens
        return [*weights, *momentum, fused.read(problem.initial, weights, queries.nan_to_num(), spans, normalize=True)]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(problem)
    plain = step(problem)
    assert_close(compiled, [t.double() for t in plain], 1e-6)
    assert_close(grads(compiled, problem, 3), [t.double() for t in grads(plain, problem, 3)], 1e-6)


def test_a_second_derivative_is_refused_and_not_wrong():
    problem = Problem.draw(depth=1).for_gradients()
    (d,) = torch.autograd.grad(problem.write()[0].square().sum(), [problem.weights[0]], create_graph=True)
    with pytest.raises(RuntimeError, match="titans_write_backward"):
        d.square().sum().backward()


def test_saving_must_be_asked_for_where_a_gradient_is_recorded():
    problem = Problem.draw(depth=1).for_gradients()
    with pytest.raises(RuntimeError, match="save=True"):
        torch.ops.mal_adapter.titans_write(*write_arguments(problem, save=False))


def test_what_only_the_derivative_needs_is_freed_without_it():
    """Inference asks for no more than the new state."""
    problem = Problem.draw(depth=2)
    assert len(torch.ops.mal_adapter.titans_write(*write_arguments(problem, save=False))) == 4
