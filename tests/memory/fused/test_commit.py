"""What a write keeps, in kernels: the same rows and counters as in PyTorch."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_adapter.memory.commit import commit
from mal_adapter.memory.spans import Spans
from mal_adapter.memory.state import MemoryState
from tests.memory.fused.interpreter import INTERPRETED, VARIABLE

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="no Triton, or one with a GPU")

SHAPES = {
    "one layer": [(2, 16, 16)],
    "two layers": [(3, 16, 24), (3, 24, 16)],
    "many blocks": [(4, 32, 64), (4, 64, 32)],
}


def random_state(rows: int, shapes: list[tuple[int, ...]]) -> MemoryState:
    layers = [tuple(torch.randn(rows, *shape) for shape in shapes) for _ in range(2)]
    return MemoryState(*layers, *torch.randint(0, 9, (3, rows)), fingerprint="0123")


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 5, 1500]), min_size=1, max_size=4),
    shapes=st.sampled_from(sorted(SHAPES)).map(SHAPES.get),
    masked=st.one_of(st.none(), st.floats(0, 1)),
    bad=st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1), st.sampled_from(["nan", "inf", "-inf"]))),
    seed=st.integers(0, 999),
)
def test_the_same_rows_and_counters_are_kept(lengths, shapes, masked, bad, seed, monkeypatch_module):
    torch.manual_seed(seed)
    spans = Spans(lengths, torch.device("cpu"))
    valid = None if masked is None else torch.rand(spans.total) < masked
    before, after = random_state(len(lengths), shapes), random_state(len(lengths), shapes)
    new = [t.clone() for t in (*after.weights, *after.momentum)]
    for tensor, place, number in bad:
        flat = new[tensor % len(new)].view(-1)
        flat[int(place * (len(flat) - 1))] = float(number)
    kept = [t.clone() for t in (*before.weights, *before.momentum)]

    def run() -> MemoryState:
        layers = len(shapes)
        fresh = [t.clone() for t in new]  # the kernels write into them
        return commit(before, tuple(fresh[:layers]), tuple(fresh[layers:]), spans, valid)

    with torch.no_grad():
        in_kernels = run()
        monkeypatch_module.setenv("MAL_ADAPTER_FUSED", "0")
        in_torch = run()
        monkeypatch_module.delenv("MAL_ADAPTER_FUSED")
    assert in_kernels.equals(in_torch)
    assert all(t.isfinite().all() for t in (*in_kernels.weights, *in_kernels.momentum))
    assert all(torch.equal(a, b) for a, b in zip(kept, (*before.weights, *before.momentum), strict=True))


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mal_adapter.memory.fused.commit_kernels import check_rows, keep_rows

pointers = {**dict.fromkeys(("new0", "new1", "new2", "new3"), "*fp32"), "flags": "*i32"}
olds = dict.fromkeys(("old0", "old1", "old2", "old3"), "*fp32")
counters = dict.fromkeys(("utterances", "tokens", "skipped", "counted"), "*i64")
numbers = dict.fromkeys(("v_t", "masked", "ROWS", "SIZE", "BLOCKS"), "i32")
sources = {
    check_rows: {**pointers, "SIZE": "i32", "BLOCKS": "i32"},
    keep_rows: {**pointers, **olds, **counters, "offsets": "*i32", "valid": "*u8", **numbers},
}
for capability in (80, 90):
    for layers in (2, 4):
        for kernel, types in sources.items():
            constants = {"LAYERS": layers, "BLOCK": 1024, "FLAGS": 32}
            constants = {name: constants[name] for name in kernel.arg_names if name in constants}
            types = types | dict.fromkeys(constants, "constexpr")
            source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, constexprs=constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            assert compiled.asm["cubin"]
            if kernel is check_rows:  # unordered or equal to infinity: NaN is found, too
                assert "fcmp ueq" in compiled.asm["llir"]
print("compiled")
"""


def test_the_kernels_compile_for_gpus_that_are_not_here():
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment)
    assert done.stdout == "compiled\n", done.stderr[-3000:]
