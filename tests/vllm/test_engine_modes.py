"""Engines of other kinds: compiled, tensor-parallel, short of memory, with a fresh adapter, restarted with a store."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mal_adapter import MemoryState, attach_memory
from tests.vllm.engines import Ask, assert_same, start, through_transformers
from tests.vllm.hosts import QWEN2_AUDIO, save_adapter

pytest.importorskip("vllm")

ASKS = [Ask(f"call-{i % 3}", (i,), turn=i // 3, seconds=0.3 + 0.1 * (i % 4)) for i in range(12)]


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
    assert_same(answers, expected)


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
    assert_same(answers, expected)
    assert (stats["writes"], stats["errors"], other[1]) == (len(ASKS), 0, None)
    assert_same(list(state.weights), list(states["call-0"].weights))


def test_what_is_preempted_is_read_again_and_not_written_again(
    host_folder: Path, adapter_folder: Path, transformers_host: Any
):
    # Room for some 300 tokens in the cache: eight dialogues of 60 tokens that grow by 40 each can't all stay.
    engine = start(host_folder, adapter_folder, num_gpu_blocks_override=12, block_size=32, max_model_len=256)
    asks = [Ask(f"call-{i % 8}", (i,), turn=i // 8, tokens=60) for i in range(16)]
    answers = engine.answer(asks)
    counters = engine.counters
    engine.stop()
    expected, _ = through_transformers(transformers_host, adapter_folder, asks)
    assert_same(answers, expected)
    assert counters.recomputed > 0
    assert counters.writes == 16
    assert counters.reads == 16 + counters.recomputed
    print(f"{counters.recomputed} recomputed reads")


def test_a_fresh_adapter_changes_no_bit(host_folder: Path, tmp_path: Path):
    engine = start(host_folder, save_adapter(tmp_path / "fresh", QWEN2_AUDIO, trained=False))
    asks = [Ask("call", (i,)) for i in range(3)]
    with_memory = engine.answer(asks)
    without = engine.answer([Ask(None, (i,)) for i in range(3)])
    writes = engine.counters.writes
    engine.stop()
    assert writes == 3
    assert_same(with_memory, without)
    assert all(map(torch.equal, with_memory, without))


def test_dialogues_continue_after_a_restart_with_a_folder(
    host_folder: Path, adapter_folder: Path, transformers_host: Any, tmp_path: Path
):
    asks = [Ask(f"call-{i % 2}", (i,), turn=i // 2) for i in range(8)]
    answers = []
    for part in (asks[:4], asks[4:]):
        engine = start(host_folder, adapter_folder, store=str(tmp_path / "sessions"))
        answers += engine.answer(part)
        engine.stop()
    expected, states = through_transformers(transformers_host, adapter_folder, asks)
    assert_same(answers, expected)
    # and transformers continues them too
    memory = attach_memory(transformers_host[0], adapter=adapter_folder, store=tmp_path / "sessions")
    assert {session: int(state.utterances) for session, state in memory.states.items()} == dict.fromkeys(states, 4)
    memory.detach()


def test_half_precision(host_folder: Path, adapter_folder: Path):
    from mal_adapter.ser.loading import load_host

    engine = start(host_folder, adapter_folder, dtype="bfloat16")
    answers = engine.answer(ASKS)
    bare = engine.answer([Ask(None, ask.clips, seconds=ask.seconds) for ask in ASKS])
    counters = engine.counters
    engine.stop()
    expected, _ = through_transformers(load_host(str(host_folder), dtype="bfloat16"), adapter_folder, ASKS)
    assert (counters.writes, counters.errors) == (len(ASKS), 0)

    def mean(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
        return float((torch.stack(a).float() - torch.stack(b).float()).abs().mean())

    # both round, each in its own order; what they agree on is the memory
    assert mean(answers, expected) < 0.25 * mean(answers, bare)
