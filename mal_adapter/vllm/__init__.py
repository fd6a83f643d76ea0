"""The memory inside vLLM: many dialogues in one engine, with the same adapter, kernels and stores as in transformers.

    from vllm import LLM, SamplingParams
    from mal_adapter.vllm import engine_args

    llm = LLM(model, **engine_args("user/mal-qwen2-audio"))
    llm.generate(prompt, SamplingParams(max_tokens=3, extra_args={"session_id": "call-42", "turn": 0}))

`ServedRecognizer` is for clients of a server. Nothing here imports vLLM before `MemoryWorker` or `SessionAdmission` is
used.
"""

from typing import TYPE_CHECKING, Any

from mal_adapter.lazy import lazy_names

if TYPE_CHECKING:
    from mal_adapter.vllm.client import ServedRecognizer
    from mal_adapter.vllm.config import MemoryOptions, engine_args, serve_flags

    MemoryWorker: Any

__all__ = ["MemoryOptions", "MemoryWorker", "ServedRecognizer", "engine_args", "serve_flags"]

_MODULES = {
    "MemoryOptions": "vllm.config",
    "MemoryWorker": "vllm.worker",
    "ServedRecognizer": "vllm.client",
    "engine_args": "vllm.config",
    "serve_flags": "vllm.config",
}

if not TYPE_CHECKING:
    __getattr__ = lazy_names(__name__, _MODULES, extra="vllm")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
