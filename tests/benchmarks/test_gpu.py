"""The GPU's table, on a small host on the CPU: every section's own code, but for what `CudaClock` has."""

import json
import math
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mal_adapter import MemoryAdapter, MemoryConfig
from mal_adapter.memory.spans import Spans
from tests.benchmarks.__main__ import options_of
from tests.benchmarks.gpu import run, warm
from tests.benchmarks.gpu.clock import CpuClock, NeedsGPUError, noted_waits
from tests.benchmarks.gpu.figures import Figure
from tests.benchmarks.gpu.host_rows import Waits
from tests.benchmarks.gpu.library import problem, read, write
from tests.benchmarks.gpu.peer_rows import OurModule
from tests.benchmarks.gpu.run import SECTIONS, Report, Section, measure
from tests.benchmarks.gpu.world import SCALES, Budget, OutOfTimeError, Size, World
from tests.benchmarks.gpu.writes import worst
from tests.benchmarks.modules import Ours

FAST = [name for name in SECTIONS if name != "compiled"]


@pytest.fixture(scope="module")
def world() -> World:
    return World(CpuClock(), SCALES["tiny"])


@pytest.fixture
def figures(world: World, request: pytest.FixtureRequest) -> dict[str, list[Figure]]:
    """The figures of a section by their measure."""
    found: dict[str, list[Figure]] = {}
    for figure in SECTIONS[request.param].measure(world, Budget(1000)):
        found.setdefault(figure.measure, []).append(figure)
    return found


def of_section(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("figures", [name], indirect=True)


@pytest.mark.parametrize("figures", FAST, indirect=True)
def test_each_section_measures_something_and_can_be_written_down(figures: dict[str, list[Figure]]):
    assert figures
    for figure in (figure for same in figures.values() for figure in same):
        assert figure.line().count("|") == 8
        assert json.loads(json.dumps(figure.as_json()))["met"] == figure.met
        assert not math.isinf(figure.value)


@of_section("prefill")
def test_a_prefill_is_measured_in_rounds_of_all_three_ways(figures):
    for within in figures["prefill with memory, more than bare"]:
        rounds = {len(times) for times in within.numbers.values()}
        assert len(rounds) == 1
        assert min(rounds) >= 5
    assert [figure.size[:7] for figure in figures["prefill with memory, more than bare"]] == ["batch 1", "batch 2"]


@of_section("precision")
def test_float32_meets_the_targets_of_precision(figures):
    assert [f.measure for same in figures.values() for f in same if f.met is False] == []
    assert all(f.value > 0 for name, same in figures.items() if "error" in name for f in same)


@pytest.mark.slow
def test_the_fused_kernels_are_measured_where_they_run():
    """Here in Triton's interpreter, which has to be chosen before the kernels are imported."""
    pytest.importorskip("mal_adapter.memory.fused")
    pytest.importorskip("triton")
    code = (
        "from tests.benchmarks.gpu.run import *; from tests.benchmarks.gpu.world import *; "
        "from tests.benchmarks.gpu.clock import *; world = World(CpuClock(), SCALES['tiny']); "
        "print(*(f.line() for f in SECTIONS['precision'].measure(world, Budget(1000))), sep='\\n')"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("write, fused, error against float64") == 4
    assert done.stdout.count("read, fused, error against float64") == 4
    assert "MISSED" not in done.stdout


@of_section("launches")
def test_launches_are_those_that_the_cpu_counts(figures):
    (both,) = figures["launches of a read and a write together"]
    read_alone, write_alone = (both.numbers[name]["launches"] for name in ("read", "write"))
    # An addition between them; the places of the rows may be made once for both, or once for each.
    assert max(read_alone, write_alone) < both.value <= read_alone + write_alone + 1
    (forward,) = figures["launches per forward, more than bare"]
    assert forward.value >= both.value - 10  # the forward makes the rows' places elsewhere


@of_section("training")
def test_training_leaves_the_adapter_as_it_was(world: World, figures):
    before = world.memory.adapter.fingerprint()
    list(SECTIONS["training"].measure(world, Budget(1000)))
    assert world.memory.adapter.fingerprint() == before
    assert all(figure.value > 0 for same in figures.values() for figure in same)


@pytest.mark.slow
@of_section("compiled")
def test_compiled_hosts_and_static_caches_are_tried(figures):
    (breaks,) = figures["graph breaks of a forward in a session"]
    assert breaks.met == ("differs by" in breaks.note)
    (static,) = figures["static cache − dynamic cache, answers and states"]
    assert static.met


def test_the_bare_host_shares_its_weights_and_has_no_memory(world: World):
    _ = world.memory
    assert {p.data_ptr() for p in world.bare.parameters()} == {p.data_ptr() for p in world.host.parameters()}
    hooked = [m for m in world.bare.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooked == []
    inputs = world.inputs(2)
    with torch.no_grad():
        bare = world.bare(**inputs).logits
        with world.memory.session(["a", "b"]):
            first, second = (world.host(**inputs).logits for _ in range(2))
    assert torch.equal(first[:, : world.scale.text_tokens // 2], bare[:, : world.scale.text_tokens // 2])
    assert not torch.equal(second, bare)
    assert world.memory.states["a"].tokens.tolist() == [2 * world.scale.audio_tokens]


class MetaClock(CpuClock):
    """For what has sizes and no numbers."""

    device = torch.device("meta")


def test_the_full_scale_is_the_7b_host():
    scale = SCALES["7b"]
    model = World(MetaClock(), scale).bare
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 1) == 8.4
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    lengths = model.audio_tower if hasattr(model, "audio_tower") else model.model.audio_tower
    _, tokens = lengths._get_feat_extract_output_lengths(torch.tensor([scale.frames]))
    assert tokens.tolist() == [scale.audio_tokens]
    assert scale.audio_tokens + scale.text_tokens == 300


# ------------------------------------------------------------------------------------------------------------ waits


@pytest.mark.parametrize(
    ("waits", "run_it"),
    [
        (1, lambda x: x.sum().item()),
        (1, lambda x: bool((x > 0).any())),
        (1, lambda x: x[x > 0]),
        (1, lambda x: (x > 0).nonzero()),
        (1, lambda x: torch.equal(x, x)),
        (1, lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64))),
        (1, lambda x: x.to("meta")),
        (0, lambda x: x.to("meta", non_blocking=True)),
        (0, lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64), output_size=4)),
        (0, lambda x: x.repeat_interleave(2)),
        (0, lambda x: x[torch.tensor([1, 2])]),
        (0, lambda x: x.masked_scatter(x > 0, x)),
        (0, lambda x: torch.where(x > 0, x, 0).cumsum(0)),
    ],
)
def test_what_waits_for_a_device_is_known(waits: int, run_it):
    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Counting.found += Waits.is_wait(func, args, kwargs or {})
            return func(*args, **(kwargs or {}))

    x = torch.tensor([1.0, -1.0, 2.0, 3.0])
    with torch.no_grad(), Counting():
        run_it(x)
    assert Counting.found == waits


def test_only_waits_of_this_library_are_noted():
    def mean(tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, tensor.float().mean().item())

    state = MemoryAdapter(MemoryConfig(hidden_size=8, memory_dim=4, num_heads=1)).initial_state()
    with torch.no_grad(), Waits() as mode:
        mean(state.tokens)
        assert mode.places == []
        state.map(mean)
    assert {place.split(":")[0] for place in mode.places} == {"memory/state.py"}


def test_warnings_of_waits_are_noted_with_their_place_in_this_library():
    def warned(tensor: Tensor) -> Tensor:
        # torch's own words in c10/cuda/CUDAFunctions.cpp
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        return tensor

    state = MemoryAdapter(MemoryConfig(hidden_size=8, memory_dim=4, num_heads=1)).initial_state()
    with noted_waits() as found:
        warned(state.tokens)
        assert found == []
        state.map(warned)
        state.map(warned)
    assert {place.split(":")[0] for place in found} == {"memory/state.py"}
    assert len(found) % 2 == 0
    assert len(found) >= 8


# ------------------------------------------------------------------------------------- the memory's functions and peers


def test_a_module_with_one_head_is_the_one_of_the_cpu_benchmark():
    torch.manual_seed(0)
    expected, module = Ours(16, 64), OurModule(Size(1, 16, 2, 2, 128))
    module.load_state_dict(expected.state_dict())
    x = torch.randn(2, 128, 16)
    (answer, state), (expected_answer, expected_state) = module(x), expected(x)
    torch.testing.assert_close(answer.view(2, 128, 16), expected_answer)
    for new, old in zip(state, expected_state, strict=True):
        torch.testing.assert_close(new, old)


def test_rows_of_a_problem_are_independent():
    size = Size(2, 16, 2, 2, 20)
    both = problem(size, torch.device("cpu"), lengths=[20, 7], masked=True)
    state = write(both, None)
    for row, tokens in enumerate((slice(0, 20), slice(20, 27))):
        alone = both._replace(
            weights=tuple(w[row : row + 1] for w in both.weights),
            momentum=tuple(s[row : row + 1] for s in both.momentum),
            keys=both.keys[tokens],
            values=both.values[tokens],
            queries=both.queries[tokens],
            gates=type(both.gates)(*(g[tokens] for g in both.gates)),
            valid=both.valid[tokens],
            spans=Spans([tokens.stop - tokens.start], torch.device("cpu")),
        )
        for new, old in zip(write(alone, None), state, strict=True):
            torch.testing.assert_close(new[0], old[row])
        torch.testing.assert_close(read(alone, None), read(both, None)[tokens])


def test_the_worst_error_is_in_norm_and_sees_what_is_not_finite():
    one = torch.ones(4)
    assert worst([one, 1.5 * one], [one, one]) == 0.5
    assert worst([one, torch.tensor([1, 1, 1, math.nan])], [one, one]) == math.inf


def test_all_sizes_of_a_memory_are_run_before_they_are_timed():
    scale = SCALES["tiny"]
    assert warm.compile_all(scale, CpuClock(), (2, 16, 2)) == 4
    assert warm.start(scale, CpuClock()) == []


# ---------------------------------------------------------------------------------------------- sections and the report


def test_a_section_that_fails_or_runs_out_of_time_leaves_the_others_alone(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def failing(world, budget):
        yield Figure("a number", "small", 1.0, "", target=2)
        raise ZeroDivisionError("nothing to divide by")

    def slow(world, budget):
        yield Figure("another number", "small", 3.0, "", target=2)
        time.sleep(0.02)
        budget.check("the rest")

    sections = {"failing": Section(failing, 10), "slow": Section(slow, 0.01), "attach": SECTIONS["attach"]}
    monkeypatch.setattr(run, "SECTIONS", sections)
    report = Report({"device": "cpu"}, tmp_path / "f.json", tmp_path / "f.md")
    measure(world, list(sections), report, 100)
    written = json.loads((tmp_path / "f.json").read_text())
    assert [f["measure"] for f in written["figures"]] == ["a number", "another number", "attach_memory"]
    assert written["problems"]["failing"] == "failed: ZeroDivisionError: nothing to divide by"
    assert "out of time" in written["problems"]["slow"]
    assert "the rest" in written["problems"]["slow"]
    printed = capsys.readouterr().out
    assert "met: 1 ≤ 2" in printed
    assert "**MISSED**: 3 > 2" in printed
    assert "1 of 2 targets MISSED\n- another number, small" in (tmp_path / "f.md").read_text()


def test_no_section_starts_when_the_time_of_all_is_over(world: World):
    report = Report({}, None, None)
    measure(world, ["attach", "waits"], report, 0.0)
    assert report.figures == []
    assert set(report.problems) == {"attach", "waits"}


def test_targets_for_times_are_those_of_the_full_scale(world: World, monkeypatch: pytest.MonkeyPatch):
    def both(world, budget):
        yield Figure("a time", "small", 3.0, "ms", "2 ms", target=1)
        yield Figure("a count", "small", 3, "", "4", target=1)

    monkeypatch.setattr(run, "SECTIONS", {"both": Section(both, 10)})
    report = Report({}, None, None)
    measure(world, ["both"], report, 100)
    assert [(f["met"], f["before"]) for f in report.figures] == [(None, ""), (False, "4")]


@pytest.mark.parametrize(("value", "sense", "met"), [(1, "≤", True), (1, "≥", True), (2, "≤", False), (0, "≥", False)])
def test_a_verdict_has_both_numbers(value: float, sense: str, met: bool):
    figure = Figure("m", "s", value, "", target=1, sense=sense)
    assert figure.met == met
    assert figure.verdict.startswith("met" if met else "**MISSED**")
    assert f"{value} " in figure.verdict
    assert figure.verdict.endswith(" 1")


def test_what_was_not_measured_is_missed():
    figure = Figure("m", "s", math.nan, "ms", target=1)
    assert figure.verdict == "**MISSED**: not measured"
    assert figure.as_json()["value"] is None


def test_a_cpu_has_no_cuda_graph_and_no_busy_time():
    clock = CpuClock()
    with pytest.raises(NeedsGPUError):
        clock.graph(lambda: None)
    value, reason = clock.graph_or_reason(lambda: None)
    assert math.isnan(value)
    assert reason == "no CUDA graph: a CUDA graph needs a GPU"
    found = clock.profile(lambda: torch.ones(2) + 1)
    assert found == (2, None, None)


def test_actions_take_turns_within_their_contexts():
    order: list[str] = []

    class Around:
        def __enter__(self):
            order.append("(")

        def __exit__(self, *_):
            order.append(")")

    times = CpuClock().interleaved(
        lambda: order.append("a"), lambda: order.append("b"), seconds=0, least=2, around=(Around, Around)
    )
    assert [len(own) for own in times] == [2, 2]
    text = "".join(order)
    assert text.replace("(", "").replace(")", "") == "abab" + "ab" + "ba"
    assert text.count("(a)") == text.count("(b)") == 4


def test_out_of_time_names_what_is_left():
    with pytest.raises(OutOfTimeError, match="batch 32"):
        Budget(0).check("batch 32")


# ------------------------------------------------------------------------------------------------------- the command


def test_the_command_writes_all_numbers_and_the_table(tmp_path: Path):
    json_path, markdown = tmp_path / "figures.json", tmp_path / "figures.md"
    files = ("--json", str(json_path), "--markdown", str(markdown))
    command = [sys.executable, "-m", "tests.benchmarks", "--scale", "tiny", "--only", "waits", "writes", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads(json_path.read_text())
    assert written["problems"] == {}
    assert {f["section"] for f in written["figures"]} == {"waits", "writes"}
    assert written["torch"] == torch.__version__
    assert {"device", "driver", "triton", "transformers", "commit"} <= written.keys()
    lines = [line for line in markdown.read_text().splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(written["figures"])
    assert all(line in done.stdout for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]):
    options = options_of(["--device", "cuda"])
    assert options.scale == "7b"
    assert run.run(options) == 2
    assert "finds no GPU; try --scale tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [("--only prefill", "prefill"), ("--scale tiny --only overhead", "overhead"), ("--markdown x", "--markdown")],
)
def test_a_section_of_the_other_table_is_refused(arguments: str, named: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        options_of(arguments.split())
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_the_peer_is_as_wide_as_ours():
    titans = pytest.importorskip("titans_pytorch", reason="comes with the extra bench, which dev does not have")
    assert titans is not None
    from tests.benchmarks.modules import titans_pytorch

    peer: nn.Module = titans_pytorch(16, 64, heads=2)
    answer, state = peer(torch.randn(1, 128, 32))
    assert answer.shape == (1, 128, 32)
    assert sum(t.shape[-2] * t.shape[-1] for t in state) > 0
