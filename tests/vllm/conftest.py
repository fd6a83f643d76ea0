"""One engine for as many tests as possible: each start takes 11 to 16 seconds."""

import os

# Before vLLM is imported. In one process, a test can look into the worker, and coverage and errors are seen.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mal_adapter import MemoryAdapter
from tests.vllm.engines import FIGURES, TOLERANCE, Engine, start
from tests.vllm.hosts import QWEN2_AUDIO, save_adapter, save_qwen2_audio


@pytest.fixture(scope="session")
def host_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen2_audio(tmp_path_factory.mktemp("vllm") / "qwen2_audio")


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("vllm") / "adapter", QWEN2_AUDIO)


@pytest.fixture(scope="session")
def adapter(adapter_folder: Path) -> MemoryAdapter:
    return MemoryAdapter.from_pretrained(adapter_folder)


@pytest.fixture(scope="session")
def shared_engine(host_folder: Path, adapter_folder: Path) -> Iterator[Engine]:
    pytest.importorskip("vllm")
    engine = start(host_folder, adapter_folder)
    yield engine
    engine.stop()


@pytest.fixture
def engine(shared_engine: Engine) -> Engine:
    """The shared engine, without sessions and with counters at zero."""
    shared_engine.reset()
    return shared_engine


@pytest.fixture(scope="session")
def transformers_host(host_folder: Path) -> Any:
    from mal_adapter.ser.loading import load_host

    return load_host(str(host_folder), dtype="float32")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how far vLLM's log-probabilities are from transformers', over the whole vocabulary."""
    if FIGURES:
        terminalreporter.section(f"vLLM against transformers, at most {TOLERANCE:.0e}")
        for test, difference in FIGURES.items():
            terminalreporter.write_line(f"{difference:.1e}  {test.removeprefix('test_').replace('_', ' ')}")
