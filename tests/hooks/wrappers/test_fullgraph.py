"""`torch.compile(model, fullgraph=True)` around a session: one graph for all sessions, with the answers and the states
of the host that is not compiled."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache

from mal_adapter import AttachedMemory, HostSpec
from mal_adapter.errors import AudioOutsideSessionWarning, SessionError
from tests.hooks.wrappers.dialogue import Heard, Turn, assert_heard_alike, attach, hear, make_turns
from tests.hosts.builders import ADDITIVE_HOSTS, AUDIO_TOKEN_ID, HOSTS, VOCAB_SIZE, WIDTH, PlainHost, TinyHost
from tests.hosts.probes import assert_states_close, same_bits

pytestmark = pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="Qwen2-Audio can't be compiled whole there, even without a memory"
)

BACKENDS = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
CACHES = pytest.mark.parametrize("cache", [DynamicCache, StaticCache])


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def host() -> TinyHost:
    return HOSTS["qwen2_audio"]


@pytest.fixture
def turns(host: TinyHost, model: PreTrainedModel) -> list[Turn]:
    return make_turns(host, model)


def whole(model: nn.Module, backend: Any = "eager") -> nn.Module:
    return torch.compile(model, backend=backend, fullgraph=True)


class Graphs:
    """A backend that runs graphs as they are, and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward

    def __deepcopy__(self, memo: dict[int, Any]) -> "Graphs":
        return self  # generate() copies its configuration


# --------------------------------------------------------------------------------------------- prompts and decode steps


@BACKENDS
@torch.no_grad()
def test_a_dialogue_is_that_of_the_host_that_is_not_compiled(model: PreTrainedModel, turns: list[Turn], backend: str):
    memory = attach(model)
    expected = hear(model, memory, turns)
    assert_heard_alike(hear(whole(model, backend), memory, turns), expected)


@torch.no_grad()
def test_one_graph_serves_all_sessions_and_modes(model: PreTrainedModel, turns: list[Turn]):
    memory = attach(model)
    expected = hear(model, memory, turns)
    graphs = Graphs()
    compiled = whole(model, graphs)
    with memory.disabled():
        compiled(**turns[0], use_cache=False)
    assert len(graphs.graphs) == 1
    for _ in range(2):
        assert_heard_alike(hear(compiled, memory, turns), expected, 0)
    with memory.session("only reads", write=False):
        compiled(**turns[0], use_cache=False)
    memory.train()
    with memory.session("trains without gradients"):
        compiled(**turns[0], use_cache=False)
    assert len(graphs.graphs) == 1
    nodes = [str(node.target) for node in graphs.graphs[0].graph.nodes]
    assert [name for name in nodes if "mal_adapter" in name].count("mal_adapter.hook_layer") == 1


@BACKENDS
@torch.no_grad()
def test_without_a_session_the_bits_are_those_of_the_bare_compiled_host(
    model: PreTrainedModel, turns: list[Turn], backend: str
):
    bare = whole(copy.deepcopy(model), backend)(**turns[0], use_cache=False).logits
    torch.compiler.reset()  # dynamo takes the graph of a class's first instance for the next ones, hooks or not
    memory = attach(model)
    compiled = whole(model, backend)
    with memory.disabled():
        assert same_bits(compiled(**turns[0], use_cache=False).logits, bare)
    with memory.session("call"):
        assert not same_bits(compiled(**turns[0], use_cache=False).logits, bare)
        with memory.disabled():
            assert same_bits(compiled(**turns[0], use_cache=False).logits, bare)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AudioOutsideSessionWarning)
        assert same_bits(compiled(**turns[0], use_cache=False).logits, bare)


@torch.no_grad()
def test_audio_outside_a_session_is_warned_of_and_after_detach_there_is_silence(
    model: PreTrainedModel, turns: list[Turn]
):
    memory = attach(model)
    compiled = whole(model)
    with pytest.warns(AudioOutsideSessionWarning):
        bare = compiled(**turns[0], use_cache=False).logits
    other = attach(model, layer_idx=0)  # which has warned of nothing yet
    torch.compiler.reset()
    with memory.disabled(), other.disabled():
        compiled(**turns[0], use_cache=False)
    memory.detach()
    other.detach()
    assert same_bits(compiled(**turns[0], use_cache=False).logits, bare)


def decoded(run: nn.Module, model: PreTrainedModel, memory: AttachedMemory, turns: list[Turn], cache: type) -> Heard:
    """A greedy answer of four tokens to each turn, the logits of all steps."""
    config, logits = model.config.get_text_config(), []
    with memory.session("decoded"):
        for turn in turns:
            past = cache(config=config, **({"max_cache_len": 40} if cache is StaticCache else {}))
            step = run(**turn, past_key_values=past, use_cache=True).logits
            logits.append(step)
            for _ in range(3):
                step = run(input_ids=step[:, -1:].argmax(-1), past_key_values=past, use_cache=True).logits
                logits.append(step)
    return Heard(logits, memory.states.pop("decoded"))


@CACHES
@BACKENDS
@torch.no_grad()
def test_decode_steps_are_too_and_two_dialogues_need_no_graph_more_than_one(
    model: PreTrainedModel, turns: list[Turn], backend: str, cache: type
):
    memory = attach(model)
    expected = decoded(model, model, memory, turns, cache)
    compiled = whole(model, backend)
    assert_heard_alike(decoded(compiled, model, memory, turns, cache), expected, 1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_heard_alike(decoded(compiled, model, memory, turns, cache), expected, 1e-4)


@torch.no_grad()
def test_generate_compiles_its_decode_step_whole_with_a_static_cache(model: PreTrainedModel, turns: list[Turn]):
    memory = attach(model)
    options = {"max_new_tokens": 4, "do_sample": False}
    with memory.session("greedy"):
        greedy = [model.generate(**turn, **options) for turn in turns]
    graphs = Graphs()
    config = CompileConfig(backend=graphs, mode=None, fullgraph=True)
    config._compile_all_devices = True  # generate() compiles on accelerators only, unless told
    with memory.session("compiled"):
        for turn, tokens in zip(turns, greedy, strict=True):
            generated = model.generate(**turn, **options, cache_implementation="static", compile_config=config)
            assert torch.equal(generated, tokens)
    assert len(graphs.graphs) > 0
    assert_states_close(memory.states["compiled"], memory.states["greedy"])


@torch.no_grad()
def test_generate_without_a_cache_repeats_its_prompt_and_writes_once(model: PreTrainedModel, turns: list[Turn]):
    """The session compares each step with the prompt of the first one, long after the graph let go of it."""
    memory = attach(model)
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": False}
    with memory.session("greedy"):
        greedy = model.generate(**turns[0], **options)
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True, dynamic=True)
    with memory.session("compiled"):
        assert torch.equal(model.generate(**turns[0], **options), greedy)
    assert memory.states["compiled"].utterances.tolist() == [1]
    assert_states_close(memory.states["compiled"], memory.states["greedy"])


@torch.inference_mode()
def test_so_it_is_in_inference_mode(model: PreTrainedModel, turns: list[Turn]):
    memory = attach(model)
    expected = hear(model, memory, turns)
    assert_heard_alike(hear(whole(model), memory, turns), expected)


@torch.no_grad()
def test_beams_and_batches_go_through(host: TinyHost, model: PreTrainedModel):
    prompts = [host.prompt([5], seed=1), host.prompt([2], seed=2)]
    inputs, _ = host.collate(model, prompts, "left")
    memory = attach(model)
    results = []
    for run in (model, whole(model)):
        with memory.session(["a", "b"]):
            batch = run(**inputs, use_cache=False).logits
            doubled = {name: value.repeat_interleave(2, dim=0) for name, value in inputs.items()}
            beams = run(**doubled, use_cache=False).logits
        results.append((batch, beams, memory.states.pop("a"), memory.states.pop("b")))
    (batch, beams, *states), (batch_2, beams_2, *states_2) = results
    torch.testing.assert_close(batch_2, batch)
    torch.testing.assert_close(beams_2, beams)
    for state, other in zip(states, states_2, strict=True):
        assert_states_close(other, state)


# ------------------------------------------------------------------------------------------------------ other arguments


class ClipsHost(PlainHost):
    """Its clips come as a list, and a mask function says where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, WIDTH)

    def forward(self, input_ids: Tensor, clips: list[Any] | None = None, shift: Tensor | None = None) -> Tensor:
        embeds = self.embedding(input_ids)
        for clip in clips or []:
            embeds = embeds + clip
        return super().forward(embeds)


def shifted_mask(call: dict[str, Any]) -> Tensor | None:
    return None if call.get("clips") is None else call["input_ids"].roll(int(call["shift"]), 1) == AUDIO_TOKEN_ID


@pytest.mark.parametrize("by_name", [True, False], ids=["by name", "by position"])
@torch.no_grad()
def test_a_list_of_clips_and_a_mask_function_work_too(by_name: bool):
    model = ClipsHost()
    spec = HostSpec(layers="blocks", hidden_size=WIDTH, feature_arguments=("clips",), find_mask=shifted_mask)
    memory = attach(model, host=spec)
    ids = torch.tensor([[3, AUDIO_TOKEN_ID, AUDIO_TOKEN_ID, 5, 7]])
    clips, shift = [torch.full((5, WIDTH), 0.1), torch.full((5, WIDTH), 0.2)], torch.tensor(1)
    states = []
    for run in (model, whole(model)):
        with memory.session("call"):
            for _ in range(2):
                run(input_ids=ids, clips=clips, shift=shift) if by_name else run(ids, clips, shift)
        states.append(memory.states.pop("call"))
    assert states[0].tokens.tolist() == [4]
    assert_states_close(states[1], states[0])


@torch.no_grad()
def test_a_list_of_what_is_no_tensor_is_a_graph_break():
    model = ClipsHost()
    spec = HostSpec(layers="blocks", hidden_size=WIDTH, feature_arguments=("clips",), audio_token_id=AUDIO_TOKEN_ID)
    memory = attach(model, host=spec)
    ids = torch.tensor([[3, AUDIO_TOKEN_ID, AUDIO_TOKEN_ID, 5, 7]])
    inner = Wrapped(model)
    with memory.session("call"), pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        whole(inner)(ids, [0.1, 0.2])


class Wrapped(nn.Module):
    """A module around a host, whose hooks are then called in what is compiled."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@torch.no_grad()
def test_a_module_around_the_host_is_one_graph_with_all_four_hooks(model: PreTrainedModel, turns: list[Turn]):
    memory = attach(model)
    expected = hear(model, memory, turns)
    graphs = Graphs()
    compiled = whole(Wrapped(model), graphs)
    for _ in range(2):
        assert_heard_alike(hear(compiled, memory, turns), expected, 0)
    (graph,) = graphs.graphs
    ours = [str(node.target) for node in graph.graph.nodes if "mal_adapter" in str(node.target)]
    assert ours[0] == "mal_adapter.hook_begin"
    assert ours.index("mal_adapter.hook_prompt") < ours.index("mal_adapter.hook_layer")
    assert ours[-1] == "mal_adapter.hook_end"


@torch.no_grad()
def test_a_streaming_host_has_graph_breaks_and_the_same_memory():
    host = ADDITIVE_HOSTS["voxtral_realtime"]
    model = host.build(num_layers=3)
    turn, _ = host.collate(model, [host.prompt([5], seed=1)])
    memory = attach(model)
    expected = hear(model, memory, [turn])
    assert_heard_alike(hear(torch.compile(model, backend="eager"), memory, [turn]), expected)


@torch.no_grad()
def test_a_copied_host_is_compiled_whole_and_bare(model: PreTrainedModel, turns: list[Turn]):
    bare = model(**turns[0], use_cache=False).logits
    memory = attach(model)
    twin = copy.deepcopy(model)
    with memory.session("call"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_bits(whole(Wrapped(twin))(**turns[0], use_cache=False).logits, bare)
        names = ("input_ids", "input_features", "attention_mask", "feature_attention_mask")
        assert same_bits(whole(Wrapped(twin))(*(turns[0][name] for name in names)).logits, bare)
    assert memory.states.get("call") is None


@torch.no_grad()
def test_an_exported_program_has_no_memory():
    model = PlainHost()
    memory = attach(model, host=HostSpec(layers="blocks", hidden_size=WIDTH))
    x = torch.randn(1, 5, WIDTH)
    program = torch.export.export(model, (x,), strict=False)
    assert not any("mal_adapter" in str(node.target) for node in program.graph.nodes)
    memory.detach()
    torch.testing.assert_close(program.module()(x), model(x))


# --------------------------------------------------------------------------------------------------------------- errors


@BACKENDS
@torch.no_grad()
def test_an_error_of_an_operation_reaches_the_caller_and_nothing_is_half_written(
    host: TinyHost, model: PreTrainedModel, turns: list[Turn], backend: str
):
    memory = attach(model)
    expected = hear(model, memory, turns[:2])
    two, _ = host.collate(model, [host.prompt([4], seed=8), host.prompt([4], seed=9)])
    compiled = whole(Wrapped(model), backend)
    with memory.session("call") as session:
        logits = [compiled(**turns[0], use_cache=False).logits]
        before = memory.states["call"]
        with pytest.raises(SessionError, match="2 rows for 1 session ids"):
            compiled(**two, use_cache=False)
        assert session.forward is None
        assert memory.states["call"] is before
        logits.append(compiled(**turns[1], use_cache=False).logits)
    assert_heard_alike(Heard(logits, memory.states["call"]), expected)


@torch.no_grad()
def test_an_error_of_the_host_leaves_the_session_as_it_was(model: PreTrainedModel, turns: list[Turn]):
    memory = attach(model)
    expected = hear(model, memory, turns[:2])
    compiled = whole(Wrapped(model))
    broken = turns[1] | {"input_ids": turns[1]["input_ids"].clone()}
    broken["input_ids"][0, -1] = 10 * VOCAB_SIZE
    with memory.session("call"):
        logits = [compiled(**turns[0], use_cache=False).logits]
        with pytest.raises(IndexError):
            compiled(**broken, use_cache=False)
        logits.append(compiled(**turns[1], use_cache=False).logits)
    assert_heard_alike(Heard(logits, memory.states["call"]), expected)
