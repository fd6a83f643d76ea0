"""Every configuration in which the memory would be wrong is refused, with the flag to change."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest

from mal_adapter.errors import ConfigError
from mal_adapter.vllm import checks
from mal_adapter.vllm.checks import check_engine, check_version, problems_of
from mal_adapter.vllm.config import ADMISSION, MemoryOptions, engine_args

OPTIONS = MemoryOptions("adapter")


class Mode:
    """vLLM's CUDAGraphMode: prefills and mixed batches run in `mixed`."""

    def __init__(self, name: str, mixed: str) -> None:
        self.name = name
        self._mixed = mixed

    def mixed_mode(self) -> Any:
        return SimpleNamespace(name=self._mixed)


def safe() -> SimpleNamespace:
    """A configuration that nothing is wrong with."""
    space = SimpleNamespace
    return space(
        scheduler_config=space(
            enable_chunked_prefill=False, long_prefill_token_threshold=0, policy="fcfs", async_scheduling=False
        ),
        cache_config=space(enable_prefix_caching=False, kv_offloading_size=None, kv_sharing_fast_prefill=False),
        parallel_config=space(
            data_parallel_size=1,
            pipeline_parallel_size=1,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            enable_dbo=False,
            ubatch_size=0,
            use_sequence_parallel_moe=False,
        ),
        model_config=space(
            logits_processors=[ADMISSION],
            multimodal_config=space(mm_processor_cache_gb=0, get_limit_per_prompt=lambda modality: 999),
            runner_type="generate",
            enable_prompt_embeds=False,
        ),
        compilation_config=space(cudagraph_mode=Mode("FULL_AND_PIECEWISE", "PIECEWISE"), pass_config=space()),
        kv_transfer_config=None,
        speculative_config=None,
    )


UNSAFE = {
    "scheduler_config.enable_chunked_prefill": (True, "--no-enable-chunked-prefill"),
    "scheduler_config.long_prefill_token_threshold": (64, "--long-prefill-token-threshold"),
    "scheduler_config.policy": ("priority", "--scheduling-policy"),
    "scheduler_config.async_scheduling": (True, "--no-async-scheduling"),
    "cache_config.enable_prefix_caching": (True, "--no-enable-prefix-caching"),
    "cache_config.kv_offloading_size": (4.0, "--kv-offloading-size"),
    "cache_config.kv_sharing_fast_prefill": (True, "--kv-sharing-fast-prefill"),
    "kv_transfer_config": (object(), "--kv-transfer-config"),
    "speculative_config": (object(), "--speculative-config"),
    "parallel_config.data_parallel_size": (2, '"store"'),
    "parallel_config.pipeline_parallel_size": (2, "--pipeline-parallel-size"),
    "parallel_config.prefill_context_parallel_size": (2, "--prefill-context-parallel-size"),
    "parallel_config.decode_context_parallel_size": (2, "--decode-context-parallel-size"),
    "parallel_config.enable_dbo": (True, "--enable-dbo"),
    "parallel_config.ubatch_size": (2, "--ubatch-size"),
    "parallel_config.use_sequence_parallel_moe": (True, "--enable-expert-parallel"),
    "model_config.logits_processors": (None, "--logits-processors"),
    "model_config.multimodal_config.mm_processor_cache_gb": (4, "--mm-processor-cache-gb 0"),
    "model_config.runner_type": ("pooling", "--runner generate"),
    "model_config.enable_prompt_embeds": (True, "--enable-prompt-embeds"),
    "compilation_config.cudagraph_mode": (Mode("FULL", "FULL"), "cudagraph_mode"),
    "compilation_config.pass_config.enable_sp": (True, "enable_sp"),
}


def with_value(path: str, value: object) -> SimpleNamespace:
    config = copy.deepcopy(safe())
    *folders, name = path.split(".")
    where: Any = config
    for folder in folders:
        where = getattr(where, folder)
    setattr(where, name, value)
    return config


@pytest.fixture(autouse=True)
def _no_entry_point(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "admission_is_installed", lambda: False)


def test_a_safe_configuration_passes():
    check_engine(safe(), OPTIONS)


@pytest.mark.parametrize("path", UNSAFE)
def test_each_unsafe_value_alone_is_refused_with_its_flag(path: str):
    value, flag = UNSAFE[path]
    (problem,) = problems_of(with_value(path, value), OPTIONS)
    assert flag in problem


def test_all_problems_are_reported_at_once():
    config = with_value("scheduler_config.enable_chunked_prefill", True)
    config.cache_config.enable_prefix_caching = True
    with pytest.raises(ConfigError) as caught:
        check_engine(config, OPTIONS)
    assert "2 problems" in str(caught.value)
    assert "--no-enable-chunked-prefill" in str(caught.value)
    assert "--no-enable-prefix-caching" in str(caught.value)


def test_replicas_may_share_a_store():
    check_engine(with_value("parallel_config.data_parallel_size", 2), MemoryOptions("adapter", "redis://host/0"))


def test_asynchronous_scheduling_is_safe_for_one_clip():
    config = with_value("scheduler_config.async_scheduling", True)
    config.model_config.multimodal_config.get_limit_per_prompt = {"audio": 1}.__getitem__
    check_engine(config, OPTIONS)


def test_an_installed_entry_point_needs_no_flag(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "admission_is_installed", lambda: True)
    check_engine(with_value("model_config.logits_processors", None), OPTIONS)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0rc1", "0.33.9"])
def test_known_versions_pass(version: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "version", lambda name: version)
    check_version()


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.32.0", "0.6.3"])
def test_other_versions_fail_loudly(version: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "version", lambda name: version)
    with pytest.raises(ConfigError, match=r"install 'vllm>=0\.32,<0\.34'"):
        check_version()


@pytest.mark.parametrize(
    "section",
    [
        None,
        {},
        {"adapter": ""},
        {"adapter": 3},
        {"adapter": None},
        {"store": "folder"},
        {"adapter": "a", "store": ""},
        {"adapter": "a", "store": 3},
        {"adapter": "a", "ttl_s": 0},
        {"adapter": "a", "ttl_s": "60"},
        {"adapter": "a", "max_sessions": 0},
        {"adapter": "a", "store": "folder", "max_sessions": 5},
        {"adapter": "a", "layer": 3},
    ],
    ids=str,
)
def test_bad_options_are_refused(section):
    with pytest.raises(ConfigError):
        MemoryOptions.read({"mal_adapter": section})


def test_engine_args_are_safe(tmp_path):
    arguments = engine_args("user/adapter", store=tmp_path, ttl_s=60)
    assert MemoryOptions.read(arguments["additional_config"]) == MemoryOptions("user/adapter", str(tmp_path), 60)
    assert not arguments["enable_chunked_prefill"]
    assert not arguments["enable_prefix_caching"]
    assert arguments["mm_processor_cache_gb"] == 0
    with pytest.raises(ConfigError):
        engine_args("")
