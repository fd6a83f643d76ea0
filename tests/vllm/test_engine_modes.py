"""The same answers from a compiled model, and from two tensor-parallel ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mal_adapter import MemoryState
from tests.vllm.engines import TOLERANCE, Ask, start, through_transformers

pytest.importorskip("vllm")

ASKS = [Ask(f"call-{i % 3}", (i,), turn=i // 3, seconds=0.3 + 0.1 * (i % 4)) for i in range(12)]


def apart(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def test_a_compiled_model(
    host_folder: Path,
    adapter_folder: Path,
    transformers_host: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    engine = start(host_folder, adapter_folder, enforce_eager=False)
    mode = engine.llm.llm_engine.vllm_config.compilation_config.mode
    answers = engine.answer(ASKS)
    counters = engine.counters
    engine.stop()
    expected, _ = through_transformers(transformers_host, adapter_folder, ASKS)
    assert mode.name != "NONE"
    assert counters.writes == len(ASKS)
    assert apart(answers, expected) <= TOLERANCE


def test_two_tensor_parallel_ranks_with_a_store(
    host_folder: Path,
    adapter_folder: Path,
    transformers_host: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Rank 0 reads and writes the store, and both compute with the same bits."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # by itself it wants a NUMA node for each rank
    parallel = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    engine = start(host_folder, adapter_folder, store=str(tmp_path / "sessions"), **parallel)
    answers = engine.answer(ASKS)
    stats = engine.call("stats")[1]
    state = MemoryState.from_bytes(engine.call("download", "call-0")[1])
    other = engine.llm.collective_rpc("mal_adapter", args=("stats",))[1]
    engine.stop()
    expected, states = through_transformers(transformers_host, adapter_folder, ASKS)
    assert apart(answers, expected) <= TOLERANCE
    assert (stats["writes"], stats["errors"], other[1]) == (len(ASKS), 0, None)
    assert apart(list(state.weights), list(states["call-0"].weights)) <= TOLERANCE
