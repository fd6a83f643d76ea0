"""torch.compile of the host, of parts of it, and of its decode step: the memory works, or a warning says it may not.

torch 2.13 calls a compiled module's own hooks outside of what is compiled, and inlines those of modules inside. Where
such a module has no hooks at the first call, dynamo looks for none later (its `skip_nnmodule_hook_guards` is True). So
a memory is ignored exactly if something around the hooked layer was compiled and called before `attach_memory`.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CompileConfig, PreTrainedModel

from mal_adapter import AttachedMemory, HostSpec
from mal_adapter.errors import IgnoredHookWarning
from tests.hooks.wrappers.dialogue import Heard, Turn, assert_heard_alike, attach, hear, make_turns
from tests.hosts.builders import HOSTS, WIDTH, PlainHost, TinyHost
from tests.hosts.probes import assert_states_close

OPERATIONS = {f"mal_adapter.hook_{name}" for name in ("begin", "prompt", "layer", "end")}
BACKEND = "eager"  # hooks are dynamo's matter, whatever a backend makes of its graphs


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# ------------------------------------------------------------------------------------ which hooks are ignored, and when


class Outer(nn.Module):
    """A host inside another module, as a language model is inside a multimodal one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = PlainHost()

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.inner(inputs_embeds)


SPEC = HostSpec(layers="inner.blocks", hidden_size=WIDTH)
AUDIO = torch.tensor([[False, True, True, True, False]])
Way = Callable[[Outer], nn.Module]


def in_place(path: str) -> Way:
    """`module.compile()`, which keeps the module."""

    def way(model: Outer) -> nn.Module:
        model.get_submodule(path).compile(backend=BACKEND)
        return model

    return way


def replaced(path: str) -> Way:
    """`module = torch.compile(module)`, which wraps it."""

    def way(model: Outer) -> nn.Module:
        compiled = torch.compile(model.get_submodule(path), backend=BACKEND)
        if not path:
            return compiled
        model.set_submodule(path, compiled)
        return model

    return way


def forward_of(path: str) -> Way:
    """`module.forward = torch.compile(module.forward)`."""

    def way(model: Outer) -> nn.Module:
        module = model.get_submodule(path)
        module.forward = torch.compile(module.forward, backend=BACKEND)
        return model

    return way


AROUND = {
    f"{way.__name__} {path or 'model'}": way(path) for path in ("", "inner") for way in (in_place, replaced, forward_of)
}
BESIDE = {
    f"{way.__name__} {path}": way(path)
    for path in ("inner.blocks.1", "inner.blocks.0", "inner.blocks.1.mix", "inner.head")
    for way in (in_place, replaced, forward_of)
}


def attach_outer(model: nn.Module) -> tuple[AttachedMemory, bool]:
    """The memory, and whether it came with a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        memory = attach(model, host=SPEC)
    return memory, any(issubclass(warning.category, IgnoredHookWarning) for warning in caught)


def speak(model: nn.Module) -> list[Tensor]:
    utterances = torch.randn(2, 1, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    return [model(utterance) for utterance in utterances]


def hear_outer(model: nn.Module, memory: AttachedMemory) -> Heard | None:
    """None if the memory was ignored."""
    with memory.session("heard", audio_mask=AUDIO):
        logits = speak(model)
    state = memory.states.pop("heard", None)
    return state and Heard(logits, state)


@pytest.fixture
def expected() -> Heard:
    model = Outer()
    with torch.no_grad():
        heard = hear_outer(model, attach_outer(model)[0])
    assert heard is not None
    return heard


@pytest.mark.parametrize("way", AROUND.values(), ids=AROUND.keys())
@torch.no_grad()
def test_trap_09_what_was_compiled_around_the_layer_and_called_ignores_the_memory_and_a_warning_says_so(
    expected: Heard, way: Way
):
    model = way(Outer())
    speak(model)
    memory, warned = attach_outer(model)
    assert warned
    assert hear_outer(model, memory) is None
    torch.compiler.reset()  # all is compiled anew, with the hooks
    heard = hear_outer(model, memory)
    assert heard is not None
    assert_heard_alike(heard, expected)


@pytest.mark.parametrize("way", BESIDE.values(), ids=BESIDE.keys())
@torch.no_grad()
def test_a_compiled_layer_or_another_part_hears_a_memory_attached_later_and_no_warning_is_given(
    expected: Heard, way: Way
):
    model = way(Outer())
    speak(model)
    memory, warned = attach_outer(model)
    assert not warned
    heard = hear_outer(model, memory)
    assert heard is not None
    assert_heard_alike(heard, expected)


@pytest.mark.parametrize("way", AROUND.values(), ids=AROUND.keys())
@torch.no_grad()
def test_attached_first_the_memory_comes_and_goes_in_what_is_compiled(expected: Heard, way: Way):
    """Though at the first call, when all is traced, it is disabled."""
    model = Outer()
    bare = speak(model)
    memory, warned = attach_outer(model)
    assert not warned
    model = way(model)
    for _ in range(2):
        with memory.disabled():
            torch.testing.assert_close(speak(model), bare)
        heard = hear_outer(model, memory)
        assert heard is not None
        assert_heard_alike(heard, expected)
    memory.detach()
    torch.testing.assert_close(speak(model), bare)


@torch.no_grad()
def test_a_full_graph_of_the_layer_and_one_around_it_read_and_write_as_before(expected: Heard):
    model = Outer()
    memory, _ = attach_outer(model)
    for path in ("inner.blocks.1", "inner", ""):
        model.get_submodule(path).compile(backend=BACKEND, fullgraph=True)
        heard = hear_outer(model, memory)
        assert heard is not None
        assert_heard_alike(heard, expected)


def test_a_full_graph_around_the_layer_is_refused_by_torch_where_gradients_are_recorded():
    model = Outer()
    memory, _ = attach_outer(model)
    model.compile(backend=BACKEND, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        hear_outer(model, memory)
    assert "heard" not in memory.states


@pytest.mark.parametrize("path", ["", "inner.blocks.1"])
def test_a_memory_trains_in_what_is_compiled(path: str):
    model = Outer().requires_grad_(False)
    memory, _ = attach_outer(model)
    memory.train()

    def gradients() -> list[Tensor]:
        memory.adapter.zero_grad()
        heard = hear_outer(model, memory)
        assert heard is not None
        heard.logits[-1].square().mean().backward()
        return [p.grad.clone() for p in memory.parameters() if p.grad is not None]

    eager = gradients()
    model.get_submodule(path).compile(backend="aot_eager")
    for a, b in zip(gradients(), eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_compiled_wrapper_of_the_host_is_warned_of_too():
    """`unwrap` passes it by on its way to the host."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(HOSTS["qwen2_audio"].build(), peft.LoraConfig(r=2, target_modules=["o_proj"]))
    model.compile(backend=BACKEND)
    with pytest.warns(IgnoredHookWarning):
        attach(model)


# --------------------------------------------------------------------------------------------------------- real hosts


def compile_layers(host: TinyHost, model: PreTrainedModel, **options: Any) -> None:
    """Regional compilation, as torch advises for models of equal blocks."""
    for layer in host.layers(model):
        layer.compile(**options)


def replace_layers(host: TinyHost, model: PreTrainedModel, **options: Any) -> None:
    layers = host.layers(model)
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer, **options)


def compile_language_model(host: TinyHost, model: PreTrainedModel, **options: Any) -> None:
    model.get_submodule(host.layers_path.rpartition(".")[0]).compile(**options)


@pytest.fixture
def host() -> TinyHost:
    return HOSTS["qwen2_audio"]


@pytest.fixture
def model(host: TinyHost) -> PreTrainedModel:
    return host.build(num_layers=2)


@pytest.fixture
def turns(host: TinyHost, model: PreTrainedModel) -> list[Turn]:
    return make_turns(host, model, clips=(4, 4))


class Backend:
    """Runs graphs as they are, and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward


@pytest.mark.parametrize("compiled", [compile_layers, replace_layers])
@torch.no_grad()
def test_a_host_of_compiled_layers_reads_and_writes_as_before(
    host: TinyHost, model: PreTrainedModel, turns: list[Turn], compiled: Callable[..., None]
):
    memory = attach(model, layer_idx=0)
    expected = hear(model, memory, turns)
    compiled(host, model, backend=BACKEND)
    assert_heard_alike(hear(model, memory, turns), expected)


@torch.no_grad()
def test_a_compiled_language_model_has_only_operations_of_the_memory_in_its_graphs_and_serves_every_session(
    host: TinyHost, model: PreTrainedModel, turns: list[Turn]
):
    """What else were traced would be compiled again for other sessions, shapes and modes."""
    memory = attach(model, layer_idx=0)
    expected = hear(model, memory, turns)
    backend = Backend()
    compile_language_model(host, model, backend=backend)
    assert_heard_alike(hear(model, memory, turns), expected)
    count = len(backend.graphs)
    assert count > 0
    for graph in backend.graphs:
        ours = [node for node in graph.graph.nodes if "mal_adapter" in (node.stack_trace or "")]
        assert {str(node.target) for node in ours if node.op == "call_function"} <= OPERATIONS
    for name in ("a", "b", "c"):
        with memory.session(name):
            for turn in turns:
                model(**turn, use_cache=False)
    with memory.session("a", write=False):
        model(**turns[0], use_cache=False)
    with memory.disabled():
        model(**turns[0], use_cache=False)
    assert len(backend.graphs) == count


@pytest.mark.parametrize("attach_first", [True, False], ids=["attach first", "compile first"])
@torch.no_grad()
def test_generate_with_a_compiled_static_cache(
    host: TinyHost, model: PreTrainedModel, turns: list[Turn], attach_first: bool
):
    """Only decode steps are compiled, and in them there is nothing to hear."""
    config = CompileConfig(backend=BACKEND, mode=None)
    config._compile_all_devices = True  # generate() compiles on accelerators only, unless told
    options = {"cache_implementation": "static", "compile_config": config, "max_new_tokens": 3, "do_sample": False}
    plain = copy.deepcopy(model)
    memory = attach(plain, layer_idx=0)
    with memory.session("greedy"):
        greedy = [plain.generate(**turn, max_new_tokens=3, do_sample=False) for turn in turns]
    expected = memory.states["greedy"]

    if not attach_first:
        model.generate(**turns[0], **options)
        assert model._compiled_call is not None
    memory = attach(model, layer_idx=0)
    with memory.session("compiled"):
        for turn, tokens in zip(turns, greedy, strict=True):
            assert torch.equal(model.generate(**turn, **options), tokens)
    assert model._compiled_call is not None
    assert memory.states["compiled"].utterances.tolist() == [len(turns)]
    assert_states_close(memory.states["compiled"], expected)


@pytest.mark.slow
@torch.no_grad()
def test_a_language_model_compiled_by_inductor_reads_and_writes_as_before(
    host: TinyHost, model: PreTrainedModel, turns: list[Turn]
):
    memory = attach(model, layer_idx=0)
    expected = hear(model, memory, turns)
    compile_language_model(host, model, backend="inductor")
    assert_heard_alike(hear(model, memory, turns), expected)


@pytest.mark.slow
@torch.no_grad()
def test_a_host_compiled_as_a_whole_reads_and_writes_as_before(
    host: TinyHost, model: PreTrainedModel, turns: list[Turn]
):
    memory = attach(model, layer_idx=0)
    expected = hear(model, memory, turns)
    assert_heard_alike(hear(torch.compile(model, backend="eager"), memory, turns), expected)
