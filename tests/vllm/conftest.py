"""One engine for as many tests as possible: each start takes 11 to 16 seconds."""

import os

# Before vLLM is imported. In one process, a test can look into the worker, and coverage and errors are seen.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mal_adapter import MemoryAdapter
from tests.vllm.engines import FIGURES, TOLERANCE, Engine, start
from tests.vllm.hosts import QWEN2_AUDIO, save_adapter, save_qwen2_audio

ROOT = Path(__file__).parents[2]


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


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    runpy.run_path(str(ROOT / "examples" / "vllm_host.py"))["write"](folder / "adapter", folder / "host")
    return folder


@pytest.fixture(scope="session")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    from mal_adapter.demo.dialogues import make_dialogue, write_wavs

    return write_wavs([make_dialogue("test", seed=7, index=i) for i in range(3)], tmp_path_factory.mktemp("wavs"))


@pytest.fixture(scope="session")
def url(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("vllm")
    import httpx

    from tests.vllm.servers import installed

    folder = tmp_path_factory.mktemp("served")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment["PYTHONPATH"] = f"{installed(folder / 'installed')}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    environment["MAL_ADAPTER_STORE"] = str(folder / "sessions")
    command = [sys.executable, "-m", "mal_adapter.cli", "serve", "--engine", "vllm", "--port", str(port)]
    command += ["--adapter", str(pair / "adapter"), "--dtype", "float32", "--", "--max-model-len", "1024"]
    command += ["--max-num-seqs", "16", "--enforce-eager", "--kv-cache-memory-bytes", str(2**26)]
    command += ["--api-key", "secret", "--served-model-name", "host"]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(300):
            if process.poll() is not None:
                break
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.4)
        assert process.poll() is None, (folder / "log.txt").read_text()[-4000:]
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how far vLLM's log-probabilities are from transformers', over the whole vocabulary."""
    if FIGURES:
        terminalreporter.section(f"vLLM against transformers, at most {TOLERANCE:.0e}")
        for test, difference in FIGURES.items():
            terminalreporter.write_line(f"{difference:.1e}  {test.removeprefix('test_').replace('_', ' ')}")
