"""The memory in a host: what it adds to the cost of an utterance and of a decode step."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import Qwen2AudioForConditionalGeneration, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

from mal_adapter import MemoryAdapter, MemoryConfig, MemoryState, attach_memory
from mal_adapter.demo import HOST_FOLDER, LAYER_IDX
from tests.benchmarks.rows import Row
from tests.benchmarks.timing import interleaved, kernels
from tests.memory.test_operations import operations_of_write

TOKENS = 250  # ten seconds of audio in Qwen2-Audio
SHAPES = {
    "7B": Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4, num_hidden_layers=28
    ),
    "3B": Qwen2Config(
        hidden_size=2048, intermediate_size=11008, num_attention_heads=16, num_key_value_heads=2, num_hidden_layers=36
    ),
}


def _layer(config: Qwen2Config, seq_len: int, dtype: torch.dtype, device: str) -> Callable[[], Tensor]:
    """A forward of one decoder layer over random hidden states, causal attention by SDPA."""
    config._attn_implementation = "sdpa"
    layer = Qwen2DecoderLayer(config, 0).to(device, dtype).eval()
    hidden_states = torch.randn(1, seq_len, config.hidden_size, device=device, dtype=dtype)
    positions = torch.arange(seq_len, device=device)[None]
    rotary = Qwen2RotaryEmbedding(config).to(device)(hidden_states, positions)

    def run() -> Tensor:
        with torch.inference_mode():
            return layer(hidden_states, position_embeddings=rotary)

    return run


def _adapter(hidden_size: int, dtype: torch.dtype, device: str) -> Callable[[], MemoryState]:
    adapter = MemoryAdapter(MemoryConfig(hidden_size=hidden_size)).to(device, dtype).eval()
    state = adapter.initial_state()
    utterance = torch.randn(1, TOKENS, hidden_size, device=device, dtype=dtype)

    def run() -> MemoryState:
        with torch.inference_mode():
            return adapter.write(state, utterance + adapter.read(state, utterance))

    return run


def overhead(device: str, seconds: float) -> Iterator[Row]:
    """Norm, projections, read and write of ten seconds of audio, against the host's layer."""
    for (name, config), dtype in itertools.product(SHAPES.items(), (torch.float32, torch.bfloat16)):
        adapter, layer = _adapter(config.hidden_size, dtype, device), _layer(config, TOKENS, dtype, device)
        mine, theirs = interleaved(adapter, layer, seconds=seconds, device=device)
        share, size = mine.median / theirs.median, f"Qwen2.5-{name}, T{TOKENS}, {str(dtype)[6:]}"
        target = 0.03 if name == "7B" else None
        yield Row("adapter (d256) / one decoder layer", size, share, "≤", target, (mine, theirs))
        prefill = share / config.num_hidden_layers
        target = 0.0011 if name == "7B" else None
        yield Row("adapter / the prefill of all layers", size, prefill, "≤", target, note="the line above / layers")


def history(device: str, seconds: float) -> Iterator[Row]:
    """The alternative to a memory: the audio of the last utterances in the prompt."""
    config = SHAPES["7B"]
    alone = _layer(config, TOKENS + 50, torch.float32, device)
    adapter = _adapter(config.hidden_size, torch.float32, device)
    for utterances in (5,):
        longer = _layer(config, (utterances + 1) * TOKENS + 50, torch.float32, device)
        own, mine, theirs = interleaved(alone, adapter, longer, seconds=2 * seconds, device=device)
        layers = config.num_hidden_layers
        ratio = theirs.median * layers / (own.median * layers + mine.median)
        name = f"prefill with {utterances} utterances of history / with a memory"
        yield Row(name, f"7B, T{TOKENS} each, 50 of text, float32", ratio, times=(own, mine, theirs))


def inactive_hooks(device: str, seconds: float) -> Iterator[Row]:
    """The cost per forward of a memory's hooks on a Qwen2-Audio outside a session, including torch's own calls of them,
    and the cost of hooks that do nothing in their places."""
    host = Qwen2AudioForConditionalGeneration.from_pretrained(HOST_FOLDER)
    memory = attach_memory(host, LAYER_IDX)
    hooked = [m for m in host.modules() if m._forward_hooks or m._forward_pre_hooks]
    x = torch.zeros(1, 1, 4)

    def forwards(make: Callable[[nn.Module], nn.Module]) -> Callable[[], None]:
        stand_ins = [make(module) for module in hooked]

        def run() -> None:
            for _ in range(1000):
                for module in stand_ins:
                    module(input=x)

        return run

    with torch.inference_mode():
        ours, still, bare = interleaved(
            forwards(_with_hooks), forwards(_with_idle_hooks), forwards(lambda _: nn.Identity()), seconds=seconds
        )
    number = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hooked)
    memory.detach()
    size = f"decode step, {number} hooks on {len(hooked)} modules"
    own = ours.median - bare.median
    yield Row("inactive hooks, µs per forward", size, own, "≤", 2, (ours, bare))
    yield Row("inactive hooks, µs per hook", size, own / number, times=(ours, bare))
    yield Row("hooks that do nothing, µs per forward", size, still.median - bare.median, times=(still, bare))


def _with_hooks(module: nn.Module) -> nn.Module:
    """An identity with the hooks of `module`."""
    idle = nn.Identity()
    options = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    for name in ("_forward_hooks", "_forward_pre_hooks", *options):
        getattr(idle, name).update(getattr(module, name))
    return idle


def _with_idle_hooks(module: nn.Module) -> nn.Module:
    """An identity with the same number and kinds of hooks, which do nothing."""
    idle = nn.Identity()
    for key in module._forward_hooks:
        idle.register_forward_hook(lambda *_: None, always_call=key in module._forward_hooks_always_called)
    for key in module._forward_pre_hooks:
        idle.register_forward_pre_hook(lambda *_: None, with_kwargs=key in module._forward_pre_hooks_with_kwargs)
    return idle


def decode_step(device: str, seconds: float) -> Iterator[Row]:
    """The cost of the hooks per forward without audio inside a session."""
    bare, host = (Qwen2AudioForConditionalGeneration.from_pretrained(HOST_FOLDER).to(device) for _ in range(2))
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with attach_memory(host, LAYER_IDX) as memory, memory.session("call"), torch.inference_mode():
        ours, theirs = interleaved(lambda: host(token), lambda: bare(token), seconds=seconds, device=device)
    cost = 1000 * (ours.median - theirs.median)
    yield Row("hooks in a session, µs per decode step", "tiny Qwen2-Audio", cost, times=(ours, theirs))


def dialogue_length(device: str, seconds: float) -> Iterator[Row]:
    """The 500th utterance against the first."""
    adapter = MemoryAdapter(MemoryConfig(hidden_size=1024)).to(device).eval()
    utterance = torch.randn(1, TOKENS, 1024, device=device)
    with torch.inference_mode():
        first = late = adapter.initial_state()
        for _ in range(500):
            late = adapter.write(late, utterance)
        early, last = interleaved(
            lambda: adapter.write(first, utterance),
            lambda: adapter.write(late, utterance),
            seconds=seconds,
            device=device,
        )
    yield Row("write 500 / write 1", f"T{TOKENS}, d256", last.median / early.median, "≤", 1.1, (last, early))
    yield Row("bytes of the state after 500 / 1", f"{first.nbytes} bytes", late.nbytes / first.nbytes, "≤", 1)


def saving(device: str, seconds: float) -> Iterator[Row]:
    """A state to bytes and back, against the write that made it."""
    adapter = MemoryAdapter(MemoryConfig(hidden_size=3584)).to(device).eval()
    utterance = torch.randn(1, TOKENS, 3584, device=device)
    with torch.inference_mode():
        state = adapter.write(adapter.initial_state(), utterance)
        data = state.to_bytes()
        write, save, load = interleaved(
            lambda: adapter.write(state, utterance),
            state.to_bytes,
            lambda: MemoryState.from_bytes(data),
            seconds=seconds,
        )
    yield Row("state to bytes / write", "d256", save.median / write.median, times=(save, write))
    yield Row("state from bytes / write", "d256", load.median / write.median, times=(load, write))


def operations(device: str, seconds: float) -> Iterator[Row]:
    """Tensor operations that compute or copy; tests/memory/test_operations.py keeps their numbers."""
    for depth in (1, 2):
        one, two = operations_of_write(depth, 1), operations_of_write(depth, 2)
        yield Row("tensor operations, whole-utterance write", f"depth {depth}", one, "≤", 35)
        yield Row("tensor operations, each further chunk", f"depth {depth}", two - one, "≤", 12)
    adapter = MemoryAdapter(MemoryConfig(hidden_size=16, memory_dim=8, num_heads=2)).eval()
    with torch.no_grad():
        state, hidden_states = adapter.initial_state(), torch.randn(1, 4, 16)
        for name, run in (("read", adapter.read), ("write", adapter.write)):
            with kernels() as count:
                run(state, hidden_states)
            yield Row(f"tensor operations, adapter.{name}", "one chunk", len(count.names))
