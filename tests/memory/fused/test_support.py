"""Which sizes, dtypes and devices the kernels take, and what is said of the others."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from mal_adapter import MemoryConfig, attach_memory
from mal_adapter.memory import fused
from mal_adapter.memory.fused import trial
from mal_adapter.memory.fused.support import Sizes, obstacle, precision
from tests.memory.fused.interpreter import INTERPRETED, VARIABLE
from tests.memory.fused.problems import Problem

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="asks what is said where there is no GPU")

CPU = torch.device("cpu")


def sizes(**changes) -> Sizes:
    return Sizes(CPU, torch.float32, torch.float32, ((64, 128), (128, 64)), 64)._replace(**changes)


@pytest.mark.parametrize(
    "taken",
    [
        sizes(),
        sizes(vectors=torch.bfloat16),
        sizes(vectors=torch.float16),
        sizes(layers=((16, 16),), chunk_size=1),
        sizes(layers=((128, 1024), (1024, 128))),
        sizes(layers=((64, 1024), (1024, 64)), chunk_size=128),
        sizes(layers=((128, 128),), chunk_size=128),
        sizes(layers=((40, 80), (80, 40)), chunk_size=None),
    ],
)
def test_taken(taken):
    assert obstacle(taken) is None


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (sizes(state=torch.float64), "the state is float64"),
        (sizes(vectors=torch.float64), "keys, values or queries are float64"),
        (sizes(layers=((8, 16), (16, 8))), "the heads' width 8 is not in 16 … 128"),
        (sizes(layers=((256, 256),)), "the heads' width 256 is not in 16 … 128"),
        (sizes(layers=((128, 2048), (2048, 128))), "the hidden width 2048 is above 1024"),
        (sizes(chunk_size=129), "chunk_size=129 is above 128"),
        (
            sizes(layers=((65, 130), (130, 65)), chunk_size=65),
            "chunk_size=65 and heads of width 65 take more shared memory than a GPU has",
        ),
        (sizes(device=torch.device("meta")), "the device is meta"),
        (sizes(device=torch.device("mps")), "the device is mps"),
    ],
)
def test_refused_in_words(refused, words):
    assert obstacle(refused) == words


def test_the_environment_switches_the_kernels_off(monkeypatch):
    problem = Problem.draw()
    assert fused.takes_write(problem.initial, problem.keys, 64)
    assert fused.takes_read(problem.initial, problem.keys)
    assert not fused.takes_write(problem.initial, problem.keys, 129)
    monkeypatch.setenv("MAL_ADAPTER_FUSED", "0")
    assert not fused.takes_write(problem.initial, problem.keys, 64)
    assert not fused.takes_read(problem.initial, problem.keys)
    assert fused.path(MemoryConfig(), CPU) == "PyTorch: MAL_ADAPTER_FUSED=0"


def test_the_path_says_the_products_accuracy():
    before = torch.get_float32_matmul_precision()
    try:
        for setting, name in (("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert precision() == name
            assert fused.path(MemoryConfig(), CPU) == f"fused ({name})"
    finally:
        torch.set_float32_matmul_precision(before)
    assert fused.path(MemoryConfig(update="gru"), CPU) == "PyTorch: the update is gru"


def test_an_attached_memory_says_which_path_it_takes(monkeypatch):
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=1, vocab_size=20, **tiny))
    with attach_memory(model, layer_idx=0) as memory:
        assert memory.status()["kernels"] == "fused (tf32x3)"
        monkeypatch.delenv(VARIABLE)
        assert memory.status()["kernels"] == "PyTorch: the device is cpu"


@pytest.mark.parametrize("training", [False, True])
def test_a_first_run_finds_what_does_not_run(training, caplog):
    good = sizes(layers=((16, 16),), chunk_size=16)
    assert trial.failure(good, training) is None
    three_layers = good._replace(layers=((16, 16),) * 3)  # `obstacle` lets no such memory pass
    with caplog.at_level(logging.WARNING, "mal_adapter"):
        reason = trial.failure(three_layers, training)
        assert reason is not None
        assert reason.startswith("the kernels don't run here, ")
        assert trial.failure(three_layers, training) == reason
    assert [record.getMessage() for record in caplog.records] == [f"The memory is computed by PyTorch: {reason}"]


def test_warming_up_says_how_long_it_took(caplog):
    config = MemoryConfig(memory_dim=16, num_heads=1, depth=1, chunk_size=16)
    with caplog.at_level(logging.INFO, "mal_adapter"):
        fused.warm_up(config, CPU, training=True)
    (line,) = caplog.messages
    assert line.startswith("The memory's kernels are ready after ")
    caplog.clear()
    fused.warm_up(MemoryConfig(update="gru"), CPU)
    assert not caplog.messages


def test_without_a_gpu_nobody_imports_triton():
    code = (
        "import sys, torch; from mal_adapter import MemoryAdapter, MemoryConfig; "
        "adapter = MemoryAdapter(MemoryConfig(hidden_size=8)); "
        "adapter.write(adapter.initial_state(), torch.zeros(1, 3, 8)); print('triton' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "False\n"
