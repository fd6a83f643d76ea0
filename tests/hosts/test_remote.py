"""A memory on hosts of remote code, each with its forward and with its own way of generating.

The host without memory shows where audio is: other audio changes what goes into its first layer at those positions.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mal_adapter import AttachedMemory, HostSpec, MemoryState, attach_memory
from mal_adapter.errors import AudioMaskError, SessionError
from mal_adapter.hosts.remote_code import REMOTE, desta25_mask, kimi_audio_mask, step_audio_2_mask, ultravox_mask
from tests.hosts.builders import AUDIO_TOKEN_ID, WIDTH
from tests.hosts.probes import assert_states_close, random_adapter, same_bits, small_config, trace_layers
from tests.hosts.remote.base import Inputs, RemoteHost, Route
from tests.hosts.remote.desta25 import DESTA25, PROMPT_SIZE
from tests.hosts.remote.kimi_audio import KIMI_AUDIO
from tests.hosts.remote.salmonn import SALMONN_HOST
from tests.hosts.remote.step_audio_2 import AUDIO_START_ID, STEP_AUDIO_2
from tests.hosts.remote.ultravox import ULTRAVOX

LAYER = 1  # of three
HOSTS = [ULTRAVOX, KIMI_AUDIO, STEP_AUDIO_2, DESTA25, SALMONN_HOST]
ROUTES = [Route(host, call) for host in HOSTS for call in ("forward", "generate")]
DETECTING = [route for route in ROUTES if not route.at]  # the others need a user's mask
DETECTING_HOSTS = list(dict.fromkeys(route.host for route in DETECTING))


@pytest.fixture(params=ROUTES, ids=str)
def route(request: pytest.FixtureRequest) -> Route:
    return request.param


@pytest.fixture
def model(route: Route) -> nn.Module:
    return route.host.build()


def batches(route: Route) -> list[tuple[str, list[list[int]]]]:
    """Padding sides, and the clips per prompt of as large a batch as the host can have."""
    clips = [[4], [7, 2] if route.host.max_clips > 1 else [7], [3]]
    if not route.host.batch_sides:
        return [("left", clips[1:2])]
    return [(side, clips) for side in route.host.batch_sides]


BATCHES = pytest.mark.parametrize(
    ("route", "padding_side", "clips"),
    [pytest.param(route, *batch, id=f"{route}-{batch[0]}") for route in ROUTES for batch in batches(route)],
)


@contextlib.contextmanager
def changes(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Where each call of a layer returns states other than its own, (batch, seq_len) bool; enter after attach."""
    own, changed = [], []

    def hidden(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    before = layer.register_forward_hook(lambda m, a, out: own.append(hidden(out).clone()), prepend=True)
    after = layer.register_forward_hook(lambda m, a, out: changed.append((hidden(out) != own.pop()).any(-1)))
    yield changed
    before.remove()
    after.remove()


def landing(route: Route, model: nn.Module, clips: Sequence[Sequence[int]], padding_side: str) -> Tensor:
    """Where the host itself puts audio, (batch, seq_len) bool."""
    host, seen = route.host, []
    prompts = [host.prompt(clip, seed=seed) for seed, clip in enumerate(clips)]
    for louder in (0, 1):
        inputs, _ = host.collate(model, prompts, padding_side)
        holder = inputs.get("samples", inputs)
        name = "spectrogram" if "samples" in inputs else host.feature_argument
        features = holder[name]
        holder[name] = [clip + louder for clip in features] if isinstance(features, list) else features + louder
        with trace_layers(host.layers(model)) as calls:
            route.run(model, inputs)
        seen.append(calls[0].hidden_in)
    landed = (seen[0] != seen[1]).any(-1)
    return landed[:: len(landed) // len(clips)]  # one of each prompt's beams


def state_after(route: Route, model: nn.Module, adapter, utterances: Sequence[tuple[Inputs, Tensor]]) -> MemoryState:
    """The state after these utterances, computed by the adapter from the hidden states of the host without memory."""
    state = adapter.initial_state()
    with torch.no_grad():
        for inputs, mask in utterances:
            with trace_layers(route.host.layers(model)) as calls:
                route.run(model, inputs)
            hidden = calls[LAYER].hidden_out
            hidden = hidden[:: len(hidden) // len(mask)]  # one of each prompt's beams
            corrected = hidden + adapter.read(state, hidden, mask)
            state = adapter.write(state, corrected[mask][None])
    return state


# -------------------------------------------------------------------------------------------------- where the audio is


@pytest.mark.parametrize("host", DETECTING_HOSTS, ids=lambda host: host.name)
def test_registry_and_detection_describe_the_host(host: RemoteHost):
    with attach_memory(host.build(), layer_idx=LAYER, adapter=random_adapter(), host=host.spec) as memory:
        assert memory.host.layers == host.layers_path
        assert memory.host.hidden_size == WIDTH
        assert memory.host.mask_module == host.multimodal_path
        assert memory.host.feature_arguments is not None
        assert host.feature_argument in memory.host.feature_arguments
        assert memory.host.find_mask is REMOTE[host.name].find_mask


@BATCHES
def test_the_residual_is_exactly_at_audio_positions_and_never_in_decode_steps(
    route: Route, padding_side: str, clips: list[list[int]]
):
    model = route.host.build()
    inputs, audio_mask = route.host.make_inputs(model, clips, padding_side=padding_side)
    landed = landing(route, model, clips, padding_side)
    memory = route.attach(model, LAYER, adapter=random_adapter())
    ids = [f"call-{row}" for row in range(len(clips))]
    with route.session(memory, ids, audio_mask), changes(route.host.layers(model)[LAYER]) as calls:
        route.run(model, inputs)
    assert torch.equal(landed, audio_mask)
    beams = len(calls[0]) // len(clips)
    for call in calls:
        new = call.shape[1] - landed.shape[1]
        expected = F.pad(landed, (0, new)) if new >= 0 else torch.zeros_like(call)
        assert torch.equal(call, expected.repeat_interleave(beams, 0) if new >= 0 else expected)
    assert len(calls) == (1 if route.call == "forward" else 3)
    assert [int(memory.states[i].tokens) for i in ids] == landed.sum(1).tolist()


# ------------------------------------------------------------------------------------------------- reading and writing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_fresh_adapter_changes_no_bit(route: Route, dtype: torch.dtype):
    model = route.host.build(dtype)
    inputs, audio_mask = route.host.make_inputs(model, [[4]])
    layers = route.host.layers(model)
    with trace_layers(layers) as bare:
        route.run(model, inputs)
    memory = route.attach(model, LAYER, config=small_config())
    for utterances in (1, 2):
        with route.session(memory, "call", audio_mask), trace_layers(layers) as attached:
            route.run(model, inputs)
        for before, after in zip(bare, attached, strict=True):
            assert same_bits(before.hidden_out, after.hidden_out)
        assert memory.states["call"].utterances.tolist() == [utterances]
    assert any(weights.abs().max() > 0 for weights in memory.states["call"].weights)


def test_each_utterance_is_written_once_and_as_the_adapter_writes_it(route: Route, model: nn.Module):
    utterances = [route.host.make_inputs(model, [[clip]], seed=clip) for clip in (4, 7, 5)]
    adapter = random_adapter()
    expected = state_after(route, model, adapter, utterances)
    memory = route.attach(model, LAYER, adapter=adapter)
    for inputs, audio_mask in utterances:
        with route.session(memory, "call", audio_mask):
            route.run(model, inputs)
    assert memory.states["call"].utterances.tolist() == [3]
    assert_states_close(memory.states["call"], expected, 1e-5)


@pytest.mark.parametrize("route", DETECTING, ids=str)
def test_one_block_takes_a_longer_second_utterance(route: Route, model: nn.Module):
    utterances = [route.host.make_inputs(model, [[clip]], text=(3, 2, clip), seed=clip) for clip in (4, 7)]
    adapter = random_adapter()
    expected = state_after(route, model, adapter, utterances)
    memory = route.attach(model, LAYER, adapter=adapter)
    with memory.session("call"):
        for inputs, _ in utterances:
            route.run(model, inputs)
    assert_states_close(memory.states["call"], expected, 1e-5)


def test_the_second_utterance_reads_the_first(route: Route, model: nn.Module):
    host = route.host
    second, audio_mask = host.make_inputs(model, [[7]], seed=2)
    memory = route.attach(model, LAYER, adapter=random_adapter())
    outputs = {}
    for session_id, first_seed in {"a": 1, "b": 1, "other": 3, "alone": None}.items():
        if first_seed is not None:
            inputs, mask = host.make_inputs(model, [[5]], seed=first_seed)
            with route.session(memory, session_id, mask):
                route.run(model, inputs)
        with route.session(memory, session_id, audio_mask), trace_layers(host.layers(model)) as calls:
            route.run(model, second)
        outputs[session_id] = calls[LAYER].hidden_out
    assert same_bits(outputs["a"], outputs["b"])
    for one, other in (("a", "other"), ("a", "alone"), ("other", "alone")):
        assert (outputs[one] - outputs[other]).abs().max() > 1e-3


@pytest.mark.parametrize("route", DETECTING, ids=str)
def test_text_alone_writes_nothing(route: Route, model: nn.Module):
    inputs, _ = route.host.make_inputs(model, [[]])
    memory = route.attach(model, LAYER, adapter=random_adapter())
    with memory.session("call"), changes(route.host.layers(model)[LAYER]) as calls:
        route.run(model, inputs)
    assert not any(call.any() for call in calls)
    assert "call" not in memory.states


# -------------------------------------------------------------------------------------------------------------- batches


@BATCHES
def test_a_batch_of_sessions_equals_the_singles(route: Route, padding_side: str, clips: list[list[int]]):
    host = route.host
    model = host.build()
    memory = route.attach(model, LAYER, adapter=random_adapter())
    names = [f"call-{row}" for row in range(len(clips))]
    for turn in range(2):
        prompts = [host.prompt(clip, seed=10 * turn + row) for row, clip in enumerate(clips)]
        inputs, audio_mask = host.collate(model, prompts, padding_side)
        with route.session(memory, names, audio_mask):
            route.run(model, inputs)
        for name, prompt in zip(names, prompts, strict=True):
            alone, alone_mask = host.collate(model, [prompt])
            with route.session(memory, f"single {name}", alone_mask):
                route.run(model, alone)
    for name in names:
        assert memory.states[name].utterances.tolist() == [2]
        assert_states_close(memory.states[name], memory.states[f"single {name}"], 1e-4)


BEAMS = [ULTRAVOX, STEP_AUDIO_2, DESTA25, SALMONN_HOST]


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("host", BEAMS, ids=lambda host: host.name)
@torch.no_grad()
def test_beams_write_once_per_prompt_the_same_as_greedy(host: RemoteHost, options: dict[str, int]):
    model, route = host.build(), Route(host, "generate")
    inputs, audio_mask = host.make_inputs(model, [[4], [3]], padding_side=host.batch_sides[0])
    memory = route.attach(model, LAYER, adapter=random_adapter())
    for _ in range(2):
        with route.session(memory, ["greedy a", "greedy b"], audio_mask):
            host.generate(model, inputs, num_beams=1)
        with route.session(memory, ["a", "b"], audio_mask):
            host.generate(model, inputs, **options)
    for name in "ab":
        assert memory.states[name].utterances.tolist() == [2]
        assert_states_close(memory.states[name], memory.states[f"greedy {name}"], 1e-5)


@pytest.mark.parametrize("host", [ULTRAVOX, STEP_AUDIO_2], ids=lambda host: host.name)
@torch.no_grad()
def test_beams_over_several_clips_in_a_prompt_are_refused(host: RemoteHost):
    """generate() repeats the clips and not the prompts, so that the host gives a beam the audio of another beam."""
    model = host.build()
    inputs, _ = host.make_inputs(model, [[4, 4]])
    memory = attach_memory(model, layer_idx=LAYER, adapter=random_adapter())
    with memory.session("call"), pytest.raises(SessionError, match="clip"):
        host.generate(model, inputs, num_beams=2)
    assert "call" not in memory.states


# ------------------------------------------------------------------------------------------------ one host at a time


def test_ultravox_up_to_0_4_has_a_clip_per_row():
    call = {"input_ids": torch.zeros(2, 4), "audio_values": torch.zeros(2, 8, 8)}
    call |= {"audio_token_start_idx": torch.tensor([0, 2]), "audio_token_len": torch.tensor([1, 2])}
    expected = torch.tensor([[1, 0, 0, 0], [0, 0, 1, 1]]).bool()
    assert torch.equal(ultravox_mask(call), expected)
    assert torch.equal(ultravox_mask(call | {"audio_batch_size": torch.tensor([[1], [1]])}), expected)


def test_ultravox_spans_may_come_with_embeddings():
    call = {"input_ids": None, "inputs_embeds": torch.zeros(1, 4, WIDTH), "audio_values": torch.zeros(1, 8, 8)}
    call |= {"audio_token_start_idx": torch.tensor([1]), "audio_token_len": torch.tensor([2])}
    assert ultravox_mask(call).tolist() == [[False, True, True, False]]


@torch.no_grad()
def test_ultravox_continues_on_its_cache_with_spans_of_the_whole_prompt():
    model = ULTRAVOX.build()
    first, second = ULTRAVOX.prompt([6], seed=1), ULTRAVOX.prompt([5], seed=2)
    memory = attach_memory(model, layer_idx=LAYER, adapter=random_adapter())
    with memory.session("call"), changes(ULTRAVOX.layers(model)[LAYER]) as calls:
        turn = ULTRAVOX.generate(model, ULTRAVOX.collate(model, [first])[0], return_dict_in_generate=True)
        calls.clear()
        inputs, mask = ULTRAVOX.collate(model, [second])
        ids = torch.cat((turn.sequences, second.ids[None]), dim=1)
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["audio_token_start_idx"] += turn.sequences.shape[1]
        ULTRAVOX.generate(model, inputs, past_key_values=turn.past_key_values)
    assert torch.equal(calls[0][:, -mask.shape[1] :], mask)  # the last token of the first turn is not cached yet
    assert memory.states["call"].utterances.tolist() == [2]
    assert memory.states["call"].tokens.tolist() == [6 + 5]


@pytest.mark.parametrize("host", [ULTRAVOX, STEP_AUDIO_2], ids=lambda host: host.name)
def test_hosts_that_merge_in_place_can_not_give_frozen_embeddings_a_gradient(host: RemoteHost):
    """What transformers does for gradient checkpointing; the host itself raises."""
    model = host.build().requires_grad_(False)
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="in-place"):
        model(**host.make_inputs(model, [[5]])[0])


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ({"audio_token_start_idx": torch.tensor([3]), "audio_token_len": torch.tensor([2])}, r"row 0, 3 … 5"),
        ({"audio_token_start_idx": torch.tensor([-1]), "audio_token_len": torch.tensor([1])}, r"row 0, -1 … 0"),
        ({"audio_start_idx": torch.tensor([1]), "audio_len": torch.tensor([8])}, "inserts the audio"),
    ],
    ids=["too long", "before the cached part", "inserted in forward"],
)
def test_ultravox_spans_outside_the_sequence_are_refused(spans: dict[str, Tensor], message: str):
    with pytest.raises(AudioMaskError, match=message):
        ultravox_mask({"input_ids": torch.zeros(1, 4), "audio_values": torch.zeros(1, 8, 8), **spans})


def test_calls_without_audio_have_no_mask():
    ids = torch.full((1, 4), AUDIO_START_ID)
    assert ultravox_mask({"input_ids": ids, "audio_values": None}) is None
    assert ultravox_mask({"input_ids": ids, "audio_values": torch.zeros(0, 8, 8)}) is None
    assert kimi_audio_mask({"input_ids": ids, "is_continuous_mask": None}) is None
    assert step_audio_2_mask({"input_ids": ids, "wavs": None}) is None
    assert desta25_mask({"input_ids": ids, "batch_start_positions": []}) is None


def test_kimi_audio_itself_has_batches_of_one_only():
    model = KIMI_AUDIO.build()
    prompts = [KIMI_AUDIO.prompt([5], seed=seed) for seed in range(2)]
    inputs, _ = KIMI_AUDIO.collate(model, prompts)
    with torch.no_grad():
        together = model(**inputs)[1][0]
        alone = model(**KIMI_AUDIO.collate(model, prompts[:1])[0])[1][0]
    assert (together - alone).abs().max() > 1e-2


@torch.no_grad()
def test_step_audio_2_itself_uses_audio_in_generate_only_without_a_cache():
    """transformers since 4.50 passes it a cache that is never filled, which it takes for a sign of a later step."""
    model = STEP_AUDIO_2.build()
    one, other = (STEP_AUDIO_2.make_inputs(model, [[5]])[0] for _ in range(2))
    other["wavs"] = -other["wavs"]
    used = {}
    for use_cache in (True, False):
        seen = []
        for inputs in (one, other):
            with trace_layers(STEP_AUDIO_2.layers(model)) as calls:
                STEP_AUDIO_2.generate(model, inputs, use_cache=use_cache)
            seen.append(calls[0].hidden_in)
        used[use_cache] = not torch.equal(*seen)
    assert used == {True: False, False: True}


def test_step_audio_2_lengths_are_those_of_its_convolutions():
    strided = functools.partial(nn.Conv1d, 1, 1, kernel_size=3, padding=1, stride=2)
    encoder = nn.Sequential(nn.Conv1d(1, 1, 3, padding=1), strided(), nn.AvgPool1d(2, stride=2), strided())
    for frames in range(4, 60):
        tokens = encoder(torch.zeros(1, 1, frames)).shape[-1]
        call = {"input_ids": torch.tensor([[AUDIO_START_ID] + 20 * [1]]), "wavs": torch.zeros(1, 128, frames)}
        assert step_audio_2_mask(call | {"wav_lens": torch.tensor([frames])}).sum() == tokens


def test_step_audio_2_refuses_an_audio_start_without_a_clip():
    """If one is generated, the host itself fails, because it looks for another clip."""
    model = STEP_AUDIO_2.build()
    inputs, _ = STEP_AUDIO_2.make_inputs(model, [[5]])
    inputs["input_ids"][0, -1] = AUDIO_START_ID
    with pytest.raises(IndexError):
        model(**inputs)
    with pytest.raises(AudioMaskError, match="places for 2 clips, and there are 1"):
        step_audio_2_mask(inputs)


def test_desta_placeholders_are_not_all_audio():
    """They are also used for the transcript, so comparing ids would take its words for audio."""
    model, route = DESTA25.build(), Route(DESTA25, "forward")
    inputs, _ = DESTA25.make_inputs(model, [[4], [7, 2]])
    placeholders = inputs["input_ids"] == AUDIO_TOKEN_ID
    audio_at = landing(route, model, [[4], [7, 2]], "left")
    assert torch.equal(desta25_mask(inputs), audio_at)
    assert (placeholders & ~audio_at).sum() == 4 + 7 + 2
    assert not (audio_at & ~placeholders).any()


def test_desta_takes_another_prompt_size():
    inputs, _ = DESTA25.make_inputs(DESTA25.build(), [[4]])
    fewer = functools.partial(desta25_mask, prompt_size=10)
    with attach_memory(
        DESTA25.build(), layer_idx=LAYER, host=HostSpec(hidden_size=WIDTH, find_mask=fewer), config=small_config()
    ) as memory:
        assert memory.host.find_mask is fewer
    assert fewer(inputs).sum() == 10
    assert desta25_mask(inputs).sum() == PROMPT_SIZE


@torch.no_grad()
def test_desta_positions_and_ids_make_the_mask_for_its_generate():
    model = DESTA25.build()
    inputs, audio_mask = DESTA25.make_inputs(model, [[4], [7]])
    memory: AttachedMemory = attach_memory(model.llm_model, layer_idx=LAYER, adapter=random_adapter())
    with memory.session(["a", "b"], audio_mask=desta25_mask(inputs)):
        DESTA25.generate(model, inputs)
    assert [int(memory.states[name].tokens) for name in "ab"] == audio_mask.sum(1).tolist()
