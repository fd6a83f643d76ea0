"""What mal_adapter relies on in vLLM's source, also where it can't run here."""

import ast
import dataclasses
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mal_adapter.errors import HostError
from mal_adapter.vllm.worker import batch_order
from tests.vllm import fakes


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("vllm.v1.core.sched.output", "NewRequestData"),
        ("vllm.v1.core.sched.output", "CachedRequestData"),
        ("vllm.v1.core.sched.output", "SchedulerOutput"),
        ("vllm.multimodal.inputs", "PlaceholderRange"),
        ("vllm.multimodal.inputs", "MultiModalFeatureSpec"),
    ],
)
def test_the_fakes_have_no_field_that_vllm_has_not(module: str, name: str):
    pytest.importorskip("vllm")
    real = getattr(pytest.importorskip(module), name)
    ours = {field.name for field in dataclasses.fields(getattr(fakes, name))}
    assert ours <= {field.name for field in dataclasses.fields(real)}


def test_sampling_parameters_have_what_is_read():
    pytest.importorskip("vllm")
    from vllm import SamplingParams

    params = SamplingParams(extra_args={"session_id": "a"}, n=1)
    assert (params.extra_args, params.n) == ({"session_id": "a"}, 1)


def calls_of(path: Path, function: str) -> list[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return [ast.unparse(call) for call in ast.walk(node) if isinstance(call, ast.Call)]
    raise AssertionError(f"no {function} in {path}")


def test_model_runner_v2_prepares_inputs_with_the_batch():
    """By its source: it does not run on a CPU."""
    vllm = pytest.importorskip("vllm")
    path = Path(vllm.__file__).parent / "v1/worker/gpu/model_runner.py"
    assert "self.model_state.prepare_inputs(input_batch, self.req_states)" in calls_of(path, "execute_model")
    batch = (path.parent / "input_batch.py").read_text()
    assert "    # batch_idx -> req_id\n    req_ids: list[str]\n" in batch


class PreparedV2:
    """As vLLM's ModelState: called before each forward, also of warm-ups."""

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        return {"positions": torch.tensor([len(input_batch.req_ids), req_states])}


def test_the_order_of_model_runner_v2_is_that_of_the_last_prepared_batch():
    runner = SimpleNamespace(model_state=PreparedV2())
    order = batch_order(runner)
    for names in (["a", "b"], ["c"]):
        prepared = runner.model_state.prepare_inputs(SimpleNamespace(req_ids=names), 7)
        assert prepared["positions"].tolist() == [len(names), 7]
        assert list(order()) == names


def test_the_order_of_model_runner_v1_is_its_batch():
    runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["a"]))
    order = batch_order(runner)
    runner.input_batch.req_ids = ["b", "a"]
    assert order() == ["b", "a"]


@pytest.mark.parametrize("runner", [SimpleNamespace(), SimpleNamespace(model_state=SimpleNamespace())])
def test_another_model_runner_fails_loudly(runner: Any):
    with pytest.raises(HostError, match="not supported"):
        batch_order(runner)


def test_admission_is_a_processor_of_both_model_runners():
    pytest.importorskip("vllm")
    from vllm.v1.sample.logits_processor import LogitsProcessor as OfV1
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as OfV2

    from mal_adapter.vllm.admission import SessionAdmission

    assert issubclass(SessionAdmission, OfV1)
    assert issubclass(SessionAdmission, OfV2)
    assert not inspect.isabstract(SessionAdmission)
    processor, logits = SessionAdmission(None, None, False), torch.ones(2, 3)
    assert processor.apply(logits) is processor.apply(logits, None) is logits
    assert not processor.add_request(0, None)
