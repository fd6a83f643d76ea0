"""The host that is measured: a Qwen2-Audio of random weights, made on the device; with and without a memory."""

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from mal_adapter import AttachedMemory, MemoryConfig, attach_memory
from tests.benchmarks.gpu.clock import Clock

__all__ = ["SCALES", "Budget", "OutOfTimeError", "Scale", "Size", "World"]


@dataclasses.dataclass(frozen=True)
class Size:
    """A memory and an input: `heads` memories of width `d`."""

    heads: int
    d: int
    depth: int
    batch: int
    seq_len: int

    def __str__(self) -> str:
        depth = "" if self.depth == 2 else f", depth {self.depth}"
        return f"{self.heads}×{self.d}{depth}, B{self.batch} T{self.seq_len}"


def _sizes(
    memories: Sequence[tuple[int, int, int]], batches: Sequence[int], lengths: Sequence[int]
) -> tuple[Size, ...]:
    return tuple(Size(*memory, *size) for memory, size in product(memories, product(batches, lengths)))


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of everything that is measured.

    Attributes:
        text, encoder: Fields of the host's configurations.
        audio_token_id: The placeholder.
        dtype: Of the host.
        layer_idx: The hooked layer.
        memory: Sizes of the memory; the defaults at full scale.
        frames: Feature frames with audio, of `2 * max_source_positions`.
        audio_tokens, text_tokens: Of a prompt.
        prefill, generate, training: Batch sizes.
        utterances: Of a training dialogue.
        writes: The grid of writes.
        modules: The grid of whole modules; lengths are multiples of the chunk, as titans-pytorch needs.
        seconds: Time per comparison, in multiples of the usual one.
        real: Whether the targets for times, and the times of 0.1.0, are about this size.
    """

    text: dict[str, Any]
    encoder: dict[str, Any]
    audio_token_id: int
    dtype: torch.dtype
    layer_idx: int
    memory: MemoryConfig
    frames: int
    audio_tokens: int
    text_tokens: int
    prefill: tuple[int, ...]
    generate: tuple[int, ...]
    training: tuple[int, ...]
    utterances: int
    writes: tuple[Size, ...]
    modules: tuple[Size, ...]
    seconds: float
    real: bool


SCALES = {
    # Qwen2-Audio-7B: 8.4 billion parameters; ten seconds of audio are 250 tokens
    "7b": Scale(
        text={
            "vocab_size": 156032, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 8192,
        },
        encoder={
            "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120,
            "num_mel_bins": 128, "max_source_positions": 1500,
        },
        audio_token_id=151646, dtype=torch.bfloat16, layer_idx=16, memory=MemoryConfig(),
        frames=1000, audio_tokens=250, text_tokens=50,
        prefill=(1, 8, 32), generate=(1, 8), training=(1, 4), utterances=4,
        writes=_sizes(((4, 64, 2), (4, 64, 1), (1, 128, 2)), (1, 8, 32), (250, 1500)),
        modules=_sizes(((1, 64, 2), (4, 64, 2), (1, 128, 2)), (1, 8, 32), (128, 512, 1536)),
        seconds=1.0, real=True,
    ),
    "tiny": Scale(
        text={
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        },
        encoder={
            "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
            "num_mel_bins": 8, "max_source_positions": 32,
        },
        audio_token_id=60, dtype=torch.float32, layer_idx=1,
        memory=MemoryConfig(memory_dim=32, num_heads=2, chunk_size=8),
        frames=48, audio_tokens=12, text_tokens=5,
        prefill=(1, 2), generate=(1,), training=(1, 2), utterances=2,
        writes=_sizes(((2, 16, 2), (2, 16, 1)), (1, 2), (20,)),
        modules=_sizes(((1, 16, 2), (2, 16, 2)), (1, 2), (128,)),
        seconds=0.0, real=False,
    ),
}  # fmt: skip


class OutOfTimeError(Exception):
    """A section's time is over; the message names what is left out."""


class Budget:
    """A section's time.

    Example:
        >>> Budget(60.0).check("batch 32")
        >>> Budget(0.0).check("batch 32")
        Traceback (most recent call last):
        ...
        tests.benchmarks.gpu.world.OutOfTimeError: batch 32
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self._end - time.perf_counter())

    def check(self, what: str) -> None:
        """Raise OutOfTimeError, which names `what`, if no time is left for it."""
        if self.left <= 0:
            raise OutOfTimeError(what)


class World:
    """The host, made at its first use: a section without one doesn't wait for it.

    Attributes:
        clock: Measures.
        scale: The sizes.
        attach_s: Seconds that attach_memory took, kernels included; None before.
    """

    def __init__(self, clock: Clock, scale: Scale) -> None:
        self.clock = clock
        self.scale = scale
        self.attach_s: float | None = None

    @cached_property
    def bare(self) -> PreTrainedModel:
        """The host without a memory, in eval mode."""
        with _default_dtype(self.scale.dtype), self.clock.device:
            torch.manual_seed(0)
            model = Qwen2AudioForConditionalGeneration(
                Qwen2AudioConfig(
                    audio_config={"model_type": "qwen2_audio_encoder", **self.scale.encoder},
                    text_config={"model_type": "qwen2", "pad_token_id": 0, **self.scale.text},
                    audio_token_index=self.scale.audio_token_id,
                )
            )
        options = model.generation_config
        # Nothing ends an answer early, and a random model may not answer with audio.
        options.eos_token_id, options.pad_token_id = None, 0
        options.suppress_tokens = [self.scale.audio_token_id]
        return model.eval()

    @cached_property
    def host(self) -> PreTrainedModel:
        """The host that the memory is attached to; it shares all tensors with `bare`."""
        shared = {id(tensor): tensor for tensor in (*self.bare.parameters(), *self.bare.buffers())}
        return copy.deepcopy(self.bare, shared)

    @cached_property
    def memory(self) -> AttachedMemory:
        """The memory of `host`."""
        self.clock.milliseconds(lambda: self.host)
        began = time.perf_counter()
        memory = attach_memory(self.host, self.scale.layer_idx, config=self.scale.memory)
        self.clock.milliseconds(lambda: None)  # waits for the device
        self.attach_s = time.perf_counter() - began
        answers_something(memory)
        return memory

    def inputs(self, batch: int, seed: int = 0) -> dict[str, Tensor]:
        """Random prompts: half of the text, the audio, the rest of the text."""
        scale, device = self.scale, self.clock.device
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, scale.text["vocab_size"] // 2, (batch, scale.text_tokens), generator=generator)
        audio = torch.full((batch, scale.audio_tokens), scale.audio_token_id)
        before, after = ids.tensor_split(2, dim=1)
        ids = torch.cat((before, audio, after), dim=1)
        frames = 2 * scale.encoder["max_source_positions"]
        features = torch.randn(batch, scale.encoder["num_mel_bins"], frames, generator=generator)
        mask = (torch.arange(frames) < scale.frames).long().expand(batch, -1)
        return {
            "input_ids": ids.to(device),
            "attention_mask": torch.ones_like(ids).to(device),
            "input_features": features.to(device, scale.dtype),
            "feature_attention_mask": mask.to(device),
        }

    def session(self, batch: int) -> Callable[[], Any]:
        """Opens the session of `batch` dialogues, which continue at each opening."""
        ids = [f"call-{row}" for row in range(batch)]
        memory = self.memory
        return lambda: memory.session(ids)

    def seconds(self, usual: float, budget: Budget) -> float:
        """For one comparison; no more than half of what is left."""
        return min(usual * self.scale.seconds, budget.left / 2)


@torch.no_grad()
def answers_something(memory: AttachedMemory) -> None:
    """A fresh memory's residual is zero; numbers of nothing but zeros are not what people run."""
    memory.adapter.readout_out.weight.normal_(std=1e-3)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
