"""A vLLM engine in this process, and the same utterances through transformers."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mal_adapter import attach_memory
from mal_adapter.vllm import engine_args
from mal_adapter.vllm.counters import Counters
from mal_adapter.vllm.memory import EngineMemory
from tests.vllm.hosts import QUESTION, clip

__all__ = [
    "FIGURES",
    "TOLERANCE",
    "Ask",
    "Engine",
    "apart",
    "assert_same",
    "dense",
    "for_transformers",
    "prompt",
    "start",
    "through_transformers",
]

TOLERANCE = 1e-5  # of log-probabilities, over the whole vocabulary
FIGURES: dict[str, float] = {}
"""The largest difference that each test has seen; printed at the end of a run."""


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request: an utterance of a dialogue, or of none.

    Attributes:
        session: The dialogue.
        clips: The seeds of its clips, and so of its audio.
        turn: As in `vllm_xargs`.
        seconds: Of each clip.
        tokens: How many tokens are to be answered.
    """

    session: str | None
    clips: tuple[int, ...]
    turn: int | None = None
    seconds: float = 0.6
    tokens: int = 1

    @property
    def prompt(self) -> str:
        return prompt(len(self.clips))

    @property
    def audio(self) -> list[Any]:
        return [clip(seed, self.seconds).numpy() for seed in self.clips]


def prompt(clips: int) -> str:
    """The chat prompt of some clips and a question."""
    audio = "<|audio_bos|><|AUDIO|><|audio_eos|>\n" * clips
    return f"<|im_start|>user\n{audio}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


def for_vllm(ask: Ask) -> dict[str, Any]:
    """A request's prompt, as `vllm.LLM` takes it."""
    audio = [(samples, 16_000) for samples in ask.audio]
    return {"prompt": ask.prompt, "multi_modal_data": {"audio": audio} if audio else {}}


def for_transformers(processor: Any, ask: Ask) -> Any:
    """A request's prompt, as the inputs of a model in transformers."""
    return processor(text=ask.prompt, audio=ask.audio or None, sampling_rate=16_000, return_tensors="pt")


class Engine:
    """`vllm.LLM` with a memory; `inputs` makes the prompts of its host."""

    def __init__(self, llm: Any, inputs: Callable[[Ask], dict[str, Any]]) -> None:
        self.llm = llm
        self.inputs = inputs

    @property
    def memory(self) -> EngineMemory:
        worker = self.llm.llm_engine.model_executor.driver_worker.worker
        return worker.memory  # type: ignore[no-any-return]

    @property
    def counters(self) -> Counters:
        return self.memory.counters

    def call(self, name: str, *args: Any) -> tuple[int, Any]:
        """What a session route asks the worker."""
        return self.llm.collective_rpc("mal_adapter", args=(name, *args))[0]  # type: ignore[no-any-return]

    def reset(self) -> None:
        """Drop all sessions, and set the counters to zero."""
        for session in self.call("list")[1]["sessions"]:
            self.call("drop", session)
        self.memory.counters = Counters()

    def params(self, ask: Ask, **others: Any) -> Any:
        from vllm import SamplingParams

        extra = {"session_id": ask.session, "turn": ask.turn}
        extra = {name: value for name, value in extra.items() if value is not None}
        given = {"max_tokens": ask.tokens, "temperature": 0, "logprobs": -1, "ignore_eos": True, **others}
        return SamplingParams(extra_args=extra or None, **given)

    def answer(self, asks: Sequence[Ask]) -> list[Tensor]:
        """The log-probabilities of the answers' first tokens, (vocabulary,) each; all requests are queued at once."""
        outputs = self.llm.generate(
            [self.inputs(ask) for ask in asks], [self.params(ask) for ask in asks], use_tqdm=False
        )
        return [dense(output.outputs[0].logprobs[0]) for output in outputs]

    def stop(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()


def apart(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest difference."""
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def assert_same(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Assert that no log-probability differs by more than `TOLERANCE`; the largest difference goes into the table."""
    difference = apart(a, b)
    test = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].partition(" (")[0]
    FIGURES[test] = max(FIGURES.get(test, 0.0), difference)
    assert difference <= TOLERANCE


def start(
    host: Path,
    adapter: Path,
    *,
    store: str | None = None,
    inputs: Callable[[Ask], dict[str, Any]] = for_vllm,
    **others: Any,
) -> Engine:
    """An engine for tests; `others` are arguments of `vllm.LLM`."""
    from vllm import LLM

    arguments: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 4096,
        "kv_cache_memory_bytes": 2**26,
        "max_logprobs": 1000,
        "limit_mm_per_prompt": {"audio": 3},
        **engine_args(adapter, store=store),
        **others,
    }
    return Engine(LLM(str(host), **arguments), inputs)


def through_transformers(
    host: tuple[Any, Any],
    adapter: Path,
    asks: Sequence[Ask],
    inputs: Callable[[Any, Ask], Any] = for_transformers,
) -> tuple[list[Tensor], dict[str, Any]]:
    """The same log-probabilities with `memory.session`, one request after the other, and the states at the end."""
    model, processor = host
    with attach_memory(model, adapter=adapter) as memory:
        answers = []
        for ask in asks:
            inside = memory.disabled() if ask.session is None else memory.session(ask.session)
            with torch.no_grad(), inside:
                answers.append(model(**inputs(processor, ask)).logits[0, -1].log_softmax(-1))
        return answers, {session: memory.states[session] for session in memory.states}


def dense(logprobs: dict[int, Any]) -> Tensor:
    """The log-probabilities of the whole vocabulary, (vocabulary,)."""
    return torch.tensor([logprobs[token].logprob for token in range(len(logprobs))])
