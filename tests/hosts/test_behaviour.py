"""What an attached memory does to a real host's forward and generate, and what it leaves alone.

Every test runs on every family of `builders.HOSTS`. The adapter is random rather than trained: its residual is large,
so a position that should not change and does is seen at once.
"""

import copy
import functools
import gc
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from mal_adapter import AttachedMemory, MemoryState, attach_memory
from mal_adapter.detection import detect_host, unwrap
from mal_adapter.errors import (
    AudioMaskError,
    AudioOutsideSessionWarning,
    ConfigError,
    HostMismatchError,
    MalAdapterError,
    SessionError,
    SkippedWriteWarning,
)
from tests.hosts.builders import AUDIO_TOKEN_ID, WIDTH, Prompt, TinyHost
from tests.hosts.probes import (
    assert_states_close,
    hook_census,
    random_adapter,
    same_bits,
    small_config,
    state_bytes,
    trace_layers,
)

LAYER = 1  # of three: a layer before it and a layer after it
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SIDES = pytest.mark.parametrize("padding_side", ["left", "right"])


@pytest.fixture
def model(host: TinyHost) -> PreTrainedModel:
    return host.build(num_layers=3)


def attach(model: nn.Module, layer_idx: int = LAYER, **options) -> AttachedMemory:
    return attach_memory(model, layer_idx=layer_idx, **({"adapter": random_adapter()} | options))


def greedy(model: PreTrainedModel, inputs: dict[str, Tensor], **options):
    return model.generate(
        **inputs,
        **{"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_scores": True, **options},
    )


def state_after(
    host: TinyHost, model: PreTrainedModel, memory: AttachedMemory, prompts: list[Prompt], session_id: str = "expected"
) -> MemoryState:
    """The state of a fresh dialogue after one forward per prompt."""
    with torch.no_grad(), memory.session(session_id):
        for prompt in prompts:
            model(**host.collate(model, [prompt])[0])
    return memory.states[session_id]


# ---------------------------------------------------------------------------------------------------- detection


def test_detection_finds_layers_width_and_placeholder(host: TinyHost, model: PreTrainedModel):
    with attach(model) as memory:
        assert memory.host.layers == host.layers_path
        assert memory.host.hidden_size == WIDTH
        assert memory.host.audio_token_id == AUDIO_TOKEN_ID
        assert memory.host.mask_module == host.multimodal_path
        assert memory.layer_idx == LAYER


def test_decoder_layers_are_told_from_other_stacks_of_as_many(host: TinyHost, model: PreTrainedModel):
    """An audio encoder may be as deep as the decoder."""
    stacks = {len(module) for module in model.modules() if isinstance(module, nn.ModuleList)}
    for count in stacks - {0}:
        assert detect_host(unwrap(host.build(num_layers=count))).layers == host.layers_path


@SIDES
@torch.no_grad()
def test_trap_14_the_audio_mask_is_exactly_where_the_host_puts_audio(
    host: TinyHost, model: PreTrainedModel, padding_side: str
):
    """Seen by where the residual lands, and by how many tokens are counted as written."""
    inputs, audio_mask = host.make_inputs(model, [[4], [7, 2], [3]], padding_side=padding_side)
    with trace_layers(host.layers(model), host.stream_idx) as bare:
        model(**inputs)
    memory = attach(model)
    with memory.session(["a", "b", "c"]), trace_layers(host.layers(model), host.stream_idx) as attached:
        model(**inputs)
    changed = (bare[LAYER].hidden_out != attached[LAYER].hidden_out).any(-1)
    assert torch.equal(changed, audio_mask)
    assert [int(memory.states[name].tokens) for name in "abc"] == audio_mask.sum(-1).tolist()


# --------------------------------------------------------------------------------- a fresh adapter, and after detach


@DTYPES
@torch.no_grad()
def test_a_fresh_adapter_is_bit_identical_to_the_bare_host(host: TinyHost, dtype: torch.dtype):
    model = host.build(dtype, num_layers=3)
    inputs, _ = host.make_inputs(model, [[4], [7]])
    logits, generated = model(**inputs).logits, greedy(model, inputs)
    memory = attach_memory(model, layer_idx=LAYER, config=small_config())
    for _ in range(2):  # the second time there is something to read
        with memory.session(["a", "b"]):
            assert same_bits(model(**inputs).logits, logits)
            again = greedy(model, inputs)
        assert same_bits(again.sequences, generated.sequences)
        assert all(same_bits(x, y) for x, y in zip(again.scores, generated.scores, strict=True))
    assert memory.states["a"].utterances.tolist() == [4]
    assert any(weights.abs().max() > 0 for weights in memory.states["a"].weights)


@DTYPES
@torch.no_grad()
def test_detach_restores_the_host_bit_for_bit_and_leaves_no_hook(host: TinyHost, dtype: torch.dtype):
    model = host.build(dtype, num_layers=3)
    inputs, _ = host.make_inputs(model, [[4], [7]])
    logits, generated, census = model(**inputs).logits, greedy(model, inputs), hook_census(model)
    memory = attach(model)
    assert hook_census(model) != census
    with memory.session(["a", "b"]):
        assert not torch.equal(model(**inputs).logits, logits)
        greedy(model, inputs)
    memory.detach()
    assert hook_census(model) == census
    assert same_bits(model(**inputs).logits, logits)
    again = greedy(model, inputs)
    assert same_bits(again.sequences, generated.sequences)
    assert all(same_bits(x, y) for x, y in zip(again.scores, generated.scores, strict=True))
    memory.detach()  # a second time is no error
    assert hook_census(model) == census


@torch.no_grad()
def test_leaving_the_with_block_detaches(host: TinyHost, model: PreTrainedModel):
    census = hook_census(model)
    with pytest.raises(ZeroDivisionError), attach(model):
        raise ZeroDivisionError
    assert hook_census(model) == census


# ------------------------------------------------------------------------------------------ where the residual lands


@SIDES
@DTYPES
@torch.no_grad()
def test_only_audio_positions_of_the_hooked_layer_change(host: TinyHost, dtype: torch.dtype, padding_side: str):
    model = host.build(dtype, num_layers=3)
    inputs, audio_mask = host.make_inputs(model, [[4], [2, 5]], padding_side=padding_side)
    with trace_layers(host.layers(model), host.stream_idx) as bare:
        model(**inputs)
    memory = attach(model)
    with memory.session(["a", "b"]), trace_layers(host.layers(model), host.stream_idx) as attached:
        model(**inputs)
    for before, after in zip(bare, attached, strict=True):
        assert after.hidden_out.dtype == dtype
        if after.layer_idx < LAYER:
            assert same_bits(before.hidden_out, after.hidden_out)
    assert same_bits(bare[LAYER].hidden_in, attached[LAYER].hidden_in)
    assert same_bits(bare[LAYER].hidden_out[~audio_mask], attached[LAYER].hidden_out[~audio_mask])
    residual = attached[LAYER].hidden_out - bare[LAYER].hidden_out
    assert residual[audio_mask].abs().amax(-1).min() > 1e-2
    assert same_bits(attached[LAYER].hidden_out, attached[LAYER + 1].hidden_in)


@torch.no_grad()
def test_the_residual_is_what_the_adapter_reads_and_the_write_is_of_what_the_next_layer_hears(
    host: TinyHost, model: PreTrainedModel
):
    prompts = [host.prompt([4], seed=1), host.prompt([7, 3], seed=2)]
    adapter = random_adapter()
    state, expected = adapter.initial_state(), []
    for prompt in prompts:
        inputs, audio_mask = host.collate(model, [prompt])
        with trace_layers(host.layers(model), host.stream_idx) as bare:
            model(**inputs)
        hidden_states = bare[LAYER].hidden_out
        expected.append(hidden_states + adapter.read(state, hidden_states, audio_mask))
        state = adapter.write(state, expected[-1][audio_mask][None])
    memory = attach(model, adapter=adapter)
    with memory.session("call"), trace_layers(host.layers(model), host.stream_idx) as attached:
        for prompt in prompts:
            model(**host.collate(model, [prompt])[0])
    outputs = [call.hidden_out for call in attached if call.layer_idx == LAYER]
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=0, atol=1e-6 * max(1.0, float(wanted.abs().max())))
    assert_states_close(memory.states["call"], state, 1e-6)


@torch.no_grad()
def test_trap_08_output_hidden_states_shows_the_residual(host: TinyHost, model: PreTrainedModel):
    if "hidden_states" in host.cannot:
        pytest.skip("the bare host can't")
    inputs, audio_mask = host.make_inputs(model, [[4], [7]])
    bare = model(**inputs, output_hidden_states=True).hidden_states
    memory = attach(model)
    with memory.session(["a", "b"]), trace_layers(host.layers(model), host.stream_idx) as calls:
        attached = model(**inputs, output_hidden_states=True).hidden_states
    assert len(bare) == len(attached)
    assert same_bits(host.stream(attached[LAYER + 1]), calls[LAYER].hidden_out)
    changed = host.stream(bare[LAYER + 1] != attached[LAYER + 1]).any(-1)
    assert torch.equal(changed, audio_mask)


@SIDES
@torch.no_grad()
def test_masks_positions_and_cache_lengths_are_as_without_memory(
    host: TinyHost, model: PreTrainedModel, padding_side: str
):
    inputs, _ = host.make_inputs(model, [[4], [7, 2]], padding_side=padding_side)
    runs = []
    memory = attach(model)
    for scope in (memory.disabled(), memory.session(["a", "b"])):
        with scope, trace_layers(host.layers(model), host.stream_idx) as calls:
            model(**inputs)
            # Unequal tokens would give unequal masks for a reason that is not ours: the same tokens are forced.
            greedy(model, inputs, logits_processor=LogitsProcessorList([Force(5)]))
        runs.append(calls)
    for bare, attached in zip(*runs, strict=True):
        assert bare.surroundings.keys() == attached.surroundings.keys()
        for what, value in bare.surroundings.items():
            assert same_bits(value, attached.surroundings[what]), (what, value, attached.surroundings[what])
    assert any(call.surroundings["cache_length_after"] is not None for call in runs[0])


class Force(LogitsProcessor):
    """Makes one token id certain."""

    def __init__(self, token_id: int, at_step: int | None = None):
        self.token_id, self.at_step, self.step = token_id, at_step, -1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.step += 1
        if self.at_step in (None, self.step):
            scores = torch.full_like(scores, -1e9)
            scores[:, self.token_id] = 0
        return scores


# ------------------------------------------------------------------------------------------------- over utterances


@torch.no_grad()
def test_the_first_utterance_reads_the_initial_state_and_the_second_what_the_first_wrote(
    host: TinyHost, model: PreTrainedModel
):
    first, second = host.prompt([6], seed=1), host.prompt([7], seed=2)
    other_first = host.prompt([6], seed=3)
    inputs, audio_mask = host.collate(model, [second])
    memory = attach(model)

    def second_after(*history, session_id):
        with memory.session(session_id):
            for prompt in history:
                model(**host.collate(model, [prompt])[0])
            return model(**inputs).logits

    alone = second_after(session_id="alone")
    assert same_bits(alone, second_after(session_id="alone again"))
    after_first = second_after(first, session_id="a")
    assert same_bits(after_first, second_after(first, session_id="b"))
    after_other = second_after(other_first, session_id="c")
    differences = [alone - after_first, alone - after_other, after_first - after_other]
    assert all(difference.abs().max() > 1e-3 for difference in differences)
    assert memory.states["a"].utterances.tolist() == [2]
    assert memory.states["a"].tokens.tolist() == [first.audio_tokens + int(audio_mask.sum())]


@torch.no_grad()
def test_a_session_goes_on_where_it_was_left(host: TinyHost, model: PreTrainedModel):
    prompts = [host.prompt([5], seed=seed) for seed in range(3)]
    memory = attach(model)
    expected = state_after(host, model, memory, prompts)
    for prompt in prompts:
        with memory.session("in parts"):
            model(**host.collate(model, [prompt])[0])
    assert memory.states["in parts"].utterances.tolist() == [3]
    assert_states_close(memory.states["in parts"], expected, 0)


@torch.no_grad()
def test_an_anonymous_session_ends_with_its_block(host: TinyHost, model: PreTrainedModel):
    inputs, _ = host.make_inputs(model, [[5]])
    memory = attach(model)

    def two_utterances():
        with memory.session():
            return model(**inputs).logits, model(**inputs).logits

    one, two = two_utterances()
    assert not torch.equal(one, two)
    one_again, two_again = two_utterances()
    assert same_bits(one, one_again)
    assert same_bits(two, two_again)
    assert list(memory.states) == []


@torch.no_grad()
def test_text_alone_writes_nothing_and_passes_unchanged(host: TinyHost, model: PreTrainedModel):
    inputs, _ = host.make_inputs(model, [[]])
    logits = model(**inputs).logits
    memory = attach(model)
    with memory.session("call"):
        assert same_bits(model(**inputs).logits, logits)
        greedy(model, inputs)
    assert "call" not in memory.states or memory.states["call"].utterances.tolist() == [0]


@torch.no_grad()
def test_placeholder_ids_without_features_are_not_audio(host: TinyHost, model: PreTrainedModel):
    """In a text-only call the id is a token like any other: the host embeds it and merges nothing."""
    inputs, _ = host.make_inputs(model, [[5]])
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs).logits
    memory = attach(model)
    with memory.session("call"):
        assert same_bits(model(**inputs).logits, logits)
    assert "call" not in memory.states or memory.states["call"].utterances.tolist() == [0]


# ---------------------------------------------------------------------------------------------------- generation


@torch.no_grad()
def test_generate_writes_once_and_as_a_forward_would(host: TinyHost, model: PreTrainedModel):
    prompt = host.prompt([4], seed=1)
    inputs, _ = host.collate(model, [prompt])
    memory = attach(model)
    expected = state_after(host, model, memory, [prompt])
    with memory.session("call"):
        greedy(model, inputs)
    assert memory.states["call"].utterances.tolist() == [1]
    assert_states_close(memory.states["call"], expected, 1e-6)


@torch.no_grad()
def test_generate_reads_the_past(host: TinyHost, model: PreTrainedModel):
    """The scores of a second utterance in a session are those of stepping by hand with forward calls that only read."""
    first, second = host.prompt([6], seed=1), host.prompt([4], seed=2)
    inputs, _ = host.collate(model, [second])
    memory = attach(model)
    state_after(host, model, memory, [first], "a")
    state_after(host, model, memory, [first], "b")
    with memory.session("a"):
        generated = greedy(model, inputs, max_new_tokens=3, output_logits=True)
    with memory.session("b", write=False):
        by_hand = dict(inputs)
        for step, scores in enumerate(generated.logits):
            logits = model(**by_hand).logits[:, -1]
            torch.testing.assert_close(scores, logits, rtol=1e-4, atol=1e-4)
            token = generated.sequences[:, inputs["input_ids"].shape[1] + step]
            by_hand["input_ids"] = torch.cat((by_hand["input_ids"], token[:, None]), dim=1)
            by_hand["attention_mask"] = torch.ones_like(by_hand["input_ids"])


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=["beams", "beams and sequences", "sampled sequences"],
)
@torch.no_grad()
def test_trap_02_beams_and_sequences_write_once_per_prompt_what_greedy_writes(
    host: TinyHost, model: PreTrainedModel, options: dict
):
    torch.manual_seed(0)
    prompts = [host.prompt([4], seed=1), host.prompt([3], seed=2)]
    inputs, audio_mask = host.collate(model, prompts)
    memory = attach(model)
    for _ in range(2):  # the second time with a past to be read by every beam
        with memory.session(["greedy a", "greedy b"]):
            greedy(model, inputs)
        with memory.session(["a", "b"]):
            greedy(model, inputs, **options)
    for row, name in enumerate("ab"):
        assert memory.states[name].utterances.tolist() == [2]
        assert memory.states[name].tokens.tolist() == [2 * int(audio_mask[row].sum())]
        assert_states_close(memory.states[name], memory.states[f"greedy {name}"], 1e-5)


@torch.no_grad()
def test_one_prompt_with_beams_in_a_single_or_anonymous_session(host: TinyHost, model: PreTrainedModel):
    prompt = host.prompt([4], seed=1)
    inputs, _ = host.collate(model, [prompt])
    memory = attach(model)
    expected = state_after(host, model, memory, [prompt])
    with memory.session("call"):
        greedy(model, inputs, num_beams=3)
    assert_states_close(memory.states["call"], expected, 1e-5)
    with memory.session():
        greedy(model, inputs, num_beams=3)


@torch.no_grad()
def test_beams_over_several_clips_in_a_prompt_are_refused(host: TinyHost, model: PreTrainedModel):
    """transformers repeats each feature row in place: a beam would hear the first clip twice and the second never."""
    if "several_clips" in host.cannot:
        pytest.skip("the bare host can't")
    prompt = host.prompt([4, 4])
    inputs, _ = host.collate(model, [prompt])
    memory = attach(model)
    if host.keeps_clips_together:
        expected = state_after(host, model, memory, [prompt])
        with memory.session("call"):
            greedy(model, inputs, num_beams=2)
        assert_states_close(memory.states["call"], expected, 1e-5)
        return
    with memory.session("call"):
        with pytest.raises(MalAdapterError, match="clip"):
            greedy(model, inputs, num_beams=2)
        assert "call" not in memory.states or memory.states["call"].utterances.tolist() == [0]
        greedy(model, inputs)
    assert memory.states["call"].utterances.tolist() == [1]


@torch.no_grad()
def test_trap_04_without_a_cache_the_utterance_is_still_written_once(host: TinyHost, model: PreTrainedModel):
    """Every step feeds all audio again; each must read the same past, and the write must happen once or be refused."""
    first, second = host.prompt([6], seed=1), host.prompt([4], seed=2)
    inputs, _ = host.collate(model, [second])
    memory = attach(model)
    for name in ("cached", "uncached"):
        state_after(host, model, memory, [first], name)
    with memory.session("cached"):
        cached = greedy(model, inputs)
    with memory.session("uncached"):
        try:
            uncached = greedy(model, inputs, use_cache=False)
        except MalAdapterError:
            assert memory.states["uncached"].utterances.tolist() == [1]
            return
    for x, y in zip(cached.scores, uncached.scores, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    assert_states_close(memory.states["uncached"], memory.states["cached"], 1e-5)


@torch.no_grad()
def test_trap_03_with_a_static_cache_the_memory_is_as_with_a_dynamic_one(host: TinyHost, model: PreTrainedModel):
    """Its masks have the cache's full length, so they are not those of the prompt."""
    if "static_cache" in host.cannot:
        pytest.skip("the bare host can't")
    first, second = host.prompt([6], seed=1), host.prompt([4], seed=2)
    memory = attach(model)
    for name, options in (("dynamic", {}), ("static", {"cache_implementation": "static"})):
        with memory.session(name):
            for prompt in (first, second):
                generated = greedy(model, host.collate(model, [prompt])[0], **options)
        if name == "dynamic":
            expected = generated
    for x, y in zip(generated.scores, expected.scores, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    assert memory.states["static"].utterances.tolist() == [2]
    assert_states_close(memory.states["static"], memory.states["dynamic"], 1e-5)


@torch.no_grad()
def test_trap_05_a_generated_placeholder_id_is_not_audio(host: TinyHost, model: PreTrainedModel):
    prompt = host.prompt([4], seed=1)
    inputs, _ = host.collate(model, [prompt])

    def run():
        return greedy(model, inputs, logits_processor=LogitsProcessorList([Force(AUDIO_TOKEN_ID, at_step=0)]))

    if not host.decodes_placeholder:
        with pytest.raises((RuntimeError, IndexError)):
            run()
        return
    # On the last layer the residual is in no key or value, so a decode step that adds none is the bare host's.
    memory = attach(model, layer_idx=2)
    expected = state_after(host, model, memory, [prompt])
    with memory.disabled(), trace_layers(host.layers(model), host.stream_idx) as bare:
        run()
    with memory.session("call"), trace_layers(host.layers(model), host.stream_idx) as attached:
        generated = run()
    assert generated.sequences[0, inputs["input_ids"].shape[1]] == AUDIO_TOKEN_ID
    assert_states_close(memory.states["call"], expected, 1e-6)
    for before, after in zip(bare[3:6], attached[3:6], strict=True):
        assert after.hidden_out.shape[1] == 1
        assert same_bits(before.hidden_out, after.hidden_out)


# ------------------------------------------------------------------------------------------------- second turns


def continued(host: TinyHost, model: PreTrainedModel, cache: DynamicCache, suffix) -> dict:
    """The keyword arguments of a forward over a suffix on top of a cache."""
    inputs, _ = host.collate(model, [suffix])
    past, new = cache.get_seq_length(), len(suffix.ids)
    return inputs | {
        "past_key_values": cache,
        "attention_mask": torch.ones(1, past + new, dtype=torch.long),
        "position_ids": torch.arange(past, past + new)[None],
    }


@torch.no_grad()
def test_a_second_turn_on_a_cache_without_audio_writes_nothing(host: TinyHost, model: PreTrainedModel):
    prompt, suffix = host.prompt([6], seed=1), host.prompt([], seed=2)
    memory = attach(model)
    with memory.session("call"):
        cache = model(**host.collate(model, [prompt])[0], use_cache=True).past_key_values
        before = memory.states["call"].clone() if "call" in memory.states else None
        model(**continued(host, model, cache, suffix))
    after = memory.states["call"]
    assert after.utterances.tolist() == [1]
    if before is not None:
        assert_states_close(before, after, 0)
    assert_states_close(after, state_after(host, model, memory, [prompt]), 1e-6)


@torch.no_grad()
def test_trap_06_a_second_turn_on_a_cache_writes_just_its_own_audio(host: TinyHost, model: PreTrainedModel):
    first, suffix = host.prompt([6], seed=1), host.prompt([5], seed=2)
    memory = attach(model)
    adapter = memory.adapter
    with memory.session("call"), trace_layers(host.layers(model), host.stream_idx) as calls:
        cache = model(**host.collate(model, [first])[0], use_cache=True).past_key_values
        model(**continued(host, model, cache, suffix))
    state = memory.states["call"]
    assert state.utterances.tolist() == [2]
    assert state.tokens.tolist() == [first.audio_tokens + suffix.audio_tokens]
    second = [call for call in calls if call.layer_idx == LAYER][1]
    assert second.hidden_out.shape[1] == len(suffix.ids)
    after_first = state_after(host, model, memory, [first])
    own_output = capture_own_output(host, model, memory, first, suffix)
    mask = suffix.audio[None]
    heard = own_output + adapter.read(after_first, own_output, mask)
    assert_states_close(state, adapter.write(after_first, heard[mask][None]), 1e-5)
    torch.testing.assert_close(second.hidden_out, heard, rtol=0, atol=1e-5)


def capture_own_output(host: TinyHost, model: PreTrainedModel, memory: AttachedMemory, first, suffix) -> Tensor:
    """The hooked layer's output for a suffix on top of a cache built with memory, without the suffix's own residual.

    The hooked layer comes after the cached ones, so the residual of the first turn is in no key or value up to it.
    """
    with memory.disabled(), trace_layers(host.layers(model), host.stream_idx) as calls:
        cache = model(**host.collate(model, [first])[0], use_cache=True).past_key_values
        model(**continued(host, model, cache, suffix))
    return [call for call in calls if call.layer_idx == LAYER][1].hidden_out


@torch.no_grad()
def test_generate_continues_a_conversation_on_its_cache(host: TinyHost, model: PreTrainedModel):
    """The second generate gets all ids, the first one's cache and only the new clip's features, as chats are served."""
    if "clips_on_a_cache" in host.cannot:
        pytest.skip("the bare host can't")
    first, suffix = host.prompt([6], seed=1), host.prompt([5], seed=2)
    inputs, _ = host.collate(model, [first])
    memory = attach(model)
    with memory.session("call"):
        turn = greedy(model, inputs)
        ids = torch.cat((turn.sequences, suffix.ids[None]), dim=1)
        suffix_inputs, _ = host.collate(model, [suffix])
        again = suffix_inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        greedy(model, again, past_key_values=turn.past_key_values)
    state = memory.states["call"]
    assert state.utterances.tolist() == [2]
    assert state.tokens.tolist() == [first.audio_tokens + suffix.audio_tokens]


# ------------------------------------------------------------------------------------------------------- batches


@SIDES
@torch.no_grad()
def test_a_batch_of_sessions_equals_the_singles(host: TinyHost, model: PreTrainedModel, padding_side: str):
    if "batches" in host.cannot:
        pytest.skip("the bare host can't")
    turns = [
        [host.prompt(clips, seed=10 * turn + row) for row, clips in enumerate(batch)]
        for turn, batch in enumerate([[[4], [8], [2, 5]], [[9], [3], [6]], [[2], [2], [7]]])
    ]
    memory = attach(model)
    for prompts in turns:
        inputs, _ = host.collate(model, prompts, padding_side)
        with memory.session(["a", "b", "c"]):
            together = model(**inputs).logits
        for row, (name, prompt) in enumerate(zip("abc", prompts, strict=True)):
            with memory.session(f"single {name}"):
                alone = model(**host.collate(model, [prompt])[0]).logits[0]
            real = inputs["attention_mask"][row].bool()
            torch.testing.assert_close(together[row][real], alone, rtol=2e-4, atol=2e-4)
    for name in "abc":
        assert_states_close(memory.states[name], memory.states[f"single {name}"], 1e-4)


@torch.no_grad()
def test_rows_belong_to_sessions_in_the_order_of_the_ids(host: TinyHost, model: PreTrainedModel):
    """Sessions that change places and partners from batch to batch keep their own past."""
    if "batches" in host.cannot:
        pytest.skip("the bare host can't")
    prompts = {name: [host.prompt([5], seed=ord(name) * 10 + turn) for turn in range(3)] for name in "abc"}
    memory = attach(model)
    for name in "abc":
        state_after(host, model, memory, prompts[name], f"serial {name}")
    for turn, order in enumerate(("abc", "cab", "bca")):
        with memory.session(list(order)):
            model(**host.collate(model, [prompts[name][turn] for name in order])[0])
    for name in "abc":
        assert_states_close(memory.states[name], memory.states[f"serial {name}"], 1e-5)


@torch.no_grad()
def test_a_row_without_audio_in_a_batch_keeps_its_state(host: TinyHost, model: PreTrainedModel):
    memory = attach(model)
    before = state_after(host, model, memory, [host.prompt([4], seed=1)], "silent")
    inputs, _ = host.collate(model, [host.prompt([], seed=2), host.prompt([4], seed=3)])
    with memory.session(["silent", "speaking"]):
        model(**inputs)
    assert_states_close(memory.states["silent"], before, 0)
    assert memory.states["speaking"].utterances.tolist() == [1]


@torch.no_grad()
def test_trap_07_under_a_bf16_host_the_state_stays_fp32(host: TinyHost):
    model = host.build(torch.bfloat16, num_layers=3)
    inputs, _ = host.make_inputs(model, [[4], [7]])
    bare_dtype = model(**inputs).logits.dtype  # some hosts return them in float32
    memory = attach(model)
    with memory.session(["a", "b"]), trace_layers(host.layers(model), host.stream_idx) as calls:
        for _ in range(3):
            logits = model(**inputs).logits
            greedy(model, inputs)
    assert logits.dtype == bare_dtype
    assert {call.hidden_out.dtype for call in calls} == {torch.bfloat16}
    state = memory.states["a"]
    assert {t.dtype for t in (*state.weights, *state.momentum)} == {torch.float32}
    assert state.utterances.tolist() == [6]


# ------------------------------------------------------------------------------------------- nothing is committed


def break_a_later_layer(host: TinyHost, model: PreTrainedModel):
    def hook(*_):
        raise ZeroDivisionError("a later layer")

    return host.layers(model)[LAYER + 1].register_forward_hook(hook)


@torch.no_grad()
def test_a_forward_that_raises_commits_nothing(host: TinyHost, model: PreTrainedModel):
    first, second = host.prompt([6], seed=1), host.prompt([4], seed=2)
    inputs, _ = host.collate(model, [second])
    memory = attach(model)
    before = state_after(host, model, memory, [first], "call")
    expected = state_after(host, model, memory, [first, second])
    broken = break_a_later_layer(host, model)
    for call in (
        model,
        functools.partial(model.generate, num_beams=2, max_new_tokens=4),
        functools.partial(model.generate, max_length=99),
    ):
        with memory.session("call"), pytest.raises(ZeroDivisionError):
            call(**inputs)
        assert_states_close(memory.states["call"], before, 0)
    broken.remove()
    with memory.session("call"):
        model(**inputs)
    assert_states_close(memory.states["call"], expected, 0)


@torch.no_grad()
def test_a_forward_that_raises_is_forgotten_even_within_one_session_block(host: TinyHost, model: PreTrainedModel):
    """What a failed call left behind must not be written by the next one that has no audio of its own."""
    first, second, text = host.prompt([6], seed=1), host.prompt([5], seed=2), host.prompt([], seed=3)
    memory = attach(model)
    with memory.session("call"):
        model(**host.collate(model, [first])[0])
        before = memory.states["call"].clone()
        broken = break_a_later_layer(host, model)
        with pytest.raises(ZeroDivisionError):
            model(**host.collate(model, [second])[0])
        broken.remove()
        model(**host.collate(model, [text])[0])
    assert_states_close(memory.states["call"], before, 0)


@torch.no_grad()
def test_write_false_reads_only(host: TinyHost, model: PreTrainedModel):
    first, second = host.prompt([6], seed=1), host.prompt([5], seed=2)
    inputs, _ = host.collate(model, [second])
    bare = model(**inputs).logits
    memory = attach(model)
    before = state_after(host, model, memory, [first], "call")
    with memory.session("call", write=False):
        read_only = model(**inputs).logits
        assert same_bits(model(**inputs).logits, read_only)
        greedy(model, inputs)
    assert_states_close(memory.states["call"], before, 0)
    with memory.session("call"):
        assert same_bits(model(**inputs).logits, read_only)
    assert memory.states["call"].utterances.tolist() == [2]
    assert not torch.equal(read_only, bare)


@torch.no_grad()
def test_disabled_is_the_bare_host_also_inside_a_session(host: TinyHost, model: PreTrainedModel):
    inputs, _ = host.make_inputs(model, [[5]])
    bare = model(**inputs).logits
    memory = attach(model)
    with memory.disabled():
        assert same_bits(model(**inputs).logits, bare)
    with memory.session("call"):
        with memory.disabled():
            assert same_bits(model(**inputs).logits, bare)
            greedy(model, inputs)
        assert not torch.equal(model(**inputs).logits, bare)
    assert memory.states["call"].utterances.tolist() == [1]


@torch.no_grad()
def test_outside_a_session_the_host_is_bare_and_a_warning_is_given_once(host: TinyHost, model: PreTrainedModel):
    inputs, _ = host.make_inputs(model, [[5]])
    text, _ = host.make_inputs(model, [[]])
    bare = model(**inputs).logits
    memory = attach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**text)
        with memory.disabled():
            model(**inputs)
    with pytest.warns(AudioOutsideSessionWarning):
        logits = model(**inputs).logits
    assert same_bits(logits, bare)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_bits(model(**inputs).logits, bare)
        greedy(model, inputs)
    assert list(memory.states) == []


def make_not_finite(host: TinyHost, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Fills the audio features with NaN or, where they are whole numbers, the table they are looked up in."""
    features = inputs[host.feature_argument]
    if features.is_floating_point():
        features.fill_(torch.nan)
    else:
        tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()]
        tables[0].weight.fill_(torch.nan)


@torch.no_grad()
def test_a_write_that_is_not_finite_does_not_land(host: TinyHost, model: PreTrainedModel):
    first, second = host.prompt([6], seed=1), host.prompt([5], seed=2)
    memory = attach(model)
    before = state_after(host, model, memory, [first], "call")
    inputs, _ = host.collate(model, [second])
    make_not_finite(host, model, inputs)
    with memory.session("call"), pytest.warns(SkippedWriteWarning):
        model(**inputs)
    after = memory.states["call"]
    assert after.skipped_writes.tolist() == [1]
    assert after.utterances.tolist() == [1]
    assert all(same_bits(a, b) for a, b in zip(before.weights, after.weights, strict=True))


# -------------------------------------------------------------------------------------------------- typed errors


@torch.no_grad()
def test_a_batch_needs_one_id_per_prompt(host: TinyHost, model: PreTrainedModel):
    inputs, _ = host.make_inputs(model, [[5], [4], [4]])
    memory = attach(model)
    for ids in ("call", ["call"], ["call", "other"], ["call", "other", "third", "fourth"], None):
        with memory.session(ids), pytest.raises((SessionError, AudioMaskError), match="3"):
            model(**inputs)
    assert all(memory.states[name].utterances.tolist() == [0] for name in memory.states)


def test_repeated_ids_and_nested_sessions_are_refused(host: TinyHost, model: PreTrainedModel):
    memory = attach(model)
    with pytest.raises(SessionError, match="call"), memory.session(["call", "call"]):
        pass
    with memory.session("outer"), pytest.raises(SessionError), memory.session("inner"):
        pass
    with memory.session("afterwards"):
        pass


@torch.no_grad()
def test_a_mask_of_the_wrong_shape_is_refused_with_both_shapes(host: TinyHost, model: PreTrainedModel):
    inputs, audio_mask = host.make_inputs(model, [[5], [4]])
    memory = attach(model)
    seq_len = audio_mask.shape[1]
    for wrong in (audio_mask[:, 1:], audio_mask[:1], audio_mask[0]):
        with pytest.raises(AudioMaskError) as raised, memory.session(["a", "b"], audio_mask=wrong):
            model(**inputs)
        assert str(seq_len) in str(raised.value)
        assert str(tuple(wrong.shape)) in str(raised.value)
    with pytest.raises(AudioMaskError, match="bool"), memory.session(["a", "b"], audio_mask=audio_mask.float()):
        model(**inputs)
    assert all(memory.states[name].utterances.tolist() == [0] for name in memory.states)


def test_a_layer_that_is_not_there_is_refused(host: TinyHost, model: PreTrainedModel):
    census = hook_census(model)
    for layer_idx in (3, -4, 1000):
        with pytest.raises(ConfigError, match=r"0 … 2"):
            attach(model, layer_idx=layer_idx)
    with pytest.raises(HostMismatchError, match="48"):
        attach(model, adapter=random_adapter(width=48))
    assert hook_census(model) == census


@torch.no_grad()
def test_a_user_mask_wins_over_detection(host: TinyHost, model: PreTrainedModel):
    inputs, audio_mask = host.make_inputs(model, [[5], [4]])
    with trace_layers(host.layers(model), host.stream_idx) as bare:
        model(**inputs)
    mine = torch.zeros_like(audio_mask)
    mine[:, -2:] = True
    memory = attach(model)
    with memory.session(["a", "b"], audio_mask=mine), trace_layers(host.layers(model), host.stream_idx) as attached:
        model(**inputs)
    assert torch.equal((bare[LAYER].hidden_out != attached[LAYER].hidden_out).any(-1), mine)
    assert memory.states["a"].tokens.tolist() == [2]


@torch.no_grad()
def test_embeddings_alone_carry_audio_only_where_the_user_says_so(host: TinyHost, model: PreTrainedModel):
    inputs, audio_mask = host.make_inputs(model, [[5]])
    table = model.get_input_embeddings()
    # The placeholder may have no embedding: past the vocabulary.
    embeds = table(inputs["input_ids"].clamp(max=table.num_embeddings - 1))
    call = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    call |= host.beside_embeddings(model, inputs["input_ids"])
    bare = model(**call).logits
    memory = attach(model)
    with memory.session("unsaid"):
        assert same_bits(model(**call).logits, bare)
    with memory.session("said", audio_mask=audio_mask):
        assert not torch.equal(model(**call).logits, bare)
    assert "unsaid" not in memory.states or memory.states["unsaid"].utterances.tolist() == [0]
    assert memory.states["said"].tokens.tolist() == [int(audio_mask.sum())]


@torch.no_grad()
def test_features_beside_embeddings_are_audio_only_where_the_host_merges_them(host: TinyHost, model: PreTrainedModel):
    """Without input_ids a host looks for the placeholder's embedding, ignores the features, or raises."""
    prompt = host.prompt([5], seed=1)
    with_ids, _ = host.collate(model, [prompt])

    def embedded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        ids, table = inputs["input_ids"], model.get_input_embeddings()
        call = {name: value for name, value in inputs.items() if name != "input_ids"}
        return call | {
            "inputs_embeds": table(ids.clamp(max=table.num_embeddings - 1)),
            **host.beside_embeddings(model, ids),
        }

    call = embedded(with_ids)
    try:
        merges = torch.allclose(model(**call).logits, model(**with_ids).logits, rtol=1e-4, atol=1e-4)
    except (RuntimeError, ValueError):
        merges = False
    memory = attach(model)
    assert bool(memory.host.merges_embeds) == merges
    if not merges:
        with memory.session("call"), pytest.raises(ValueError):  # noqa: PT011 - AudioMaskError, or the host's own
            model(**call)
        return
    expected = state_after(host, model, memory, [prompt])
    per_token = {name for name, value in with_ids.items() if value.shape == with_ids["input_ids"].shape}
    longer = {name: F.pad(value, (0, 1), value=1) if name in per_token else value for name, value in with_ids.items()}
    with memory.session("call"):
        model(**call, use_cache=False)
        model(**embedded(longer), use_cache=False)  # as who decodes without a cache feeds it again
    assert_states_close(memory.states["call"], expected, 1e-5)


@torch.no_grad()
def test_a_forward_called_past_the_hooks_is_heard_or_refused(host: TinyHost, model: PreTrainedModel):
    """PEFT before 0.21 calls `model.forward`. An inner module that merges the audio is called as ever."""
    prompt = host.prompt([5], seed=1)
    inputs, audio_mask = host.collate(model, [prompt])
    memory = attach(model)
    expected = state_after(host, model, memory, [prompt])
    if host.multimodal_path:
        with memory.session("call"):
            model.forward(**inputs)
    else:
        with memory.session("call"), pytest.raises(AudioMaskError, match="was not called"):
            model.forward(**inputs)
        assert "call" not in memory.states
        with memory.session("call", audio_mask=audio_mask):
            model.forward(**inputs)
    assert_states_close(memory.states["call"], expected, 1e-6)


# --------------------------------------------------------------------------------------- several memories, freedom


@torch.no_grad()
def test_two_memories_on_two_layers_are_independent(host: TinyHost, model: PreTrainedModel):
    first, second = host.prompt([5], seed=1), host.prompt([4], seed=2)
    inputs, _ = host.collate(model, [second])
    early = attach(model, 0, adapter=random_adapter(seed=1))
    with early.session("call"):
        model(**host.collate(model, [first])[0])
        only_early = model(**inputs).logits
    late = attach(model, 2, adapter=random_adapter(seed=2))
    with early.session("again"), late.session("again"), trace_layers(host.layers(model), host.stream_idx) as calls:
        model(**host.collate(model, [first])[0])
        both = model(**inputs).logits
    assert_states_close(early.states["again"], early.states["call"], 0)  # a later layer can't reach an earlier one
    assert early.states["again"].utterances.tolist() == late.states["again"].utterances.tolist() == [2]
    assert not torch.equal(both, only_early)
    with early.session("third"), warnings.catch_warnings():
        warnings.simplefilter("ignore", AudioOutsideSessionWarning)
        model(**host.collate(model, [first])[0])
        assert same_bits(model(**inputs).logits, only_early)
    late.detach()
    with early.session("fourth"):
        model(**host.collate(model, [first])[0])
        assert same_bits(model(**inputs).logits, only_early)
    early.detach()
    assert len(calls) == 6


@torch.no_grad()
def test_detach_frees_everything(host: TinyHost, model: PreTrainedModel):
    inputs, _ = host.make_inputs(model, [[5]])
    memory = attach(model)
    with memory.session("call"):
        greedy(model, inputs)
        model(**inputs)
    references = [weakref.ref(memory), weakref.ref(memory.adapter), weakref.ref(memory.states["call"].weights[0])]
    memory.detach()
    del memory
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


@torch.no_grad()
def test_a_session_leaves_no_tensor_of_a_forward_alive(host: TinyHost, model: PreTrainedModel):
    """Hooks hold nothing between calls: the hidden states of an utterance die with it."""
    memory = attach(model)
    inputs, _ = host.make_inputs(model, [[5]])
    references = []

    def watch(_module, args, out):
        references.append(weakref.ref(out[0] if isinstance(out, tuple) else out))

    handle = host.layers(model)[LAYER].register_forward_hook(watch)
    with memory.session("call"):
        model(**inputs, use_cache=False)
        gc.collect()
        assert [reference() for reference in references] == [None]
    handle.remove()


@torch.no_grad()
def test_an_attached_model_can_be_copied_and_pickled(host: TinyHost, model: PreTrainedModel):
    inputs, _ = host.make_inputs(model, [[5]])
    memory = attach(model)
    with memory.session("call"):
        expected = model(**inputs).logits
    before = memory.states["call"].clone()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with memory.session("call", write=False):
            model(**inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AudioOutsideSessionWarning)
            assert twin(**inputs).logits.shape == expected.shape
        assert {name: t.shape for name, t in twin.state_dict().items()} == {
            name: t.shape for name, t in model.state_dict().items()
        }
    assert_states_close(memory.states["call"], before, 0)


# ------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def trained(host: TinyHost, model: PreTrainedModel):
    """A frozen host and a trainable memory, both in train mode, and two dialogues of two utterances."""
    model.requires_grad_(False).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()  # frozen or not, in train mode the bare host changes its running statistics
    memory = attach(model)
    memory.train()
    turns = [host.collate(model, [host.prompt([6], seed=1), host.prompt([5], seed=2)])[0],
             host.collate(model, [host.prompt([4], seed=3), host.prompt([7], seed=4)])[0]]  # fmt: skip
    return model, memory, turns


def loss_of(logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, -1], torch.tensor([3, 9]))


def test_the_backbone_is_untouched_by_attach_run_train_step_and_detach(host: TinyHost, trained):
    model, memory, turns = trained
    memory.detach()
    before = state_bytes(model)
    memory = attach(model)
    memory.train()
    assert state_bytes(model) == before
    optimizer = torch.optim.AdamW(memory.parameters(), lr=1e-2)
    parameters_before = [p.detach().clone() for p in memory.parameters()]
    for dialogue in range(2):
        with memory.session([f"{dialogue} a", f"{dialogue} b"]):
            for turn in turns:
                loss = loss_of(model(**turn).logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert any(not torch.equal(p, q) for p, q in zip(memory.parameters(), parameters_before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert state_bytes(model) == before
    model.eval()
    memory.eval()
    with torch.no_grad(), memory.session(["a", "b"]):
        greedy(model, turns[0])
    assert state_bytes(model) == before
    memory.detach()
    assert state_bytes(model) == before


def test_the_backbones_parameters_are_not_among_the_memorys(host: TinyHost, trained):
    model, memory, _ = trained
    backbone = {id(p) for p in model.parameters()}
    mine = list(memory.parameters())
    assert mine
    assert not backbone & {id(p) for p in mine}
    assert {id(p) for p in mine} == {id(p) for p in memory.adapter.parameters()}
    assert not {id(p) for p in memory.adapter.parameters()} & {id(p) for p in model.parameters()}


def test_the_second_utterances_loss_reaches_the_write_of_the_first(host: TinyHost, trained):
    """Only writes use values and gates: their gradients come through the state, from one forward to the next."""
    model, memory, turns = trained
    adapter = memory.adapter
    width, heads = adapter.config.memory_dim, adapter.config.num_heads
    value_rows = slice(3 * width, 4 * width)
    step_rows = slice(4 * width, 4 * width + heads)

    with memory.session(["a", "b"]):
        loss_of(model(**turns[0]).logits).backward()
    assert adapter.in_proj.weight.grad[value_rows].abs().max() == 0
    adapter.zero_grad()
    with memory.session(["c", "d"]):
        model(**turns[0])
        loss_of(model(**turns[1]).logits).backward()
    assert adapter.in_proj.weight.grad[value_rows].abs().max() > 1e-8
    assert adapter.in_proj.weight.grad[step_rows].abs().max() > 1e-8
    assert all(p.grad is not None and p.grad.isfinite().all() for p in memory.parameters())


@pytest.mark.parametrize("only_write", [False, True], ids=["all parameters", "those of the write"])
def test_the_gradient_through_two_utterances_is_the_slope(host: TinyHost, trained, only_write: bool):
    """Against a central difference of the whole run along a random direction."""
    model, memory, turns = trained
    model.double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped matrix product has no float64
    for path in host.float32_modules:
        model.get_submodule(path).float()
    adapter = memory.adapter.double()
    turns = [{k: v.double() if v.is_floating_point() else v for k, v in turn.items()} for turn in turns]

    def loss() -> Tensor:
        memory.states.clear()
        with memory.session(["a", "b"]):
            model(**turns[0])
            return loss_of(model(**turns[1]).logits)

    loss().backward()
    torch.manual_seed(0)
    direction = {name: torch.randn_like(p) for name, p in adapter.named_parameters()}
    if only_write:
        width = adapter.config.memory_dim
        direction = {name: torch.zeros_like(d) for name, d in direction.items()}
        direction["in_proj.weight"][3 * width :].normal_()  # values, gates
    norm = torch.stack([d.square().sum() for d in direction.values()]).sum().sqrt()
    gradient = {name: p.grad.clone() for name, p in adapter.named_parameters()}
    slope = sum((gradient[name] * d).sum() for name, d in direction.items()) / norm
    scale = torch.stack([(gradient[name] * (d != 0)).square().sum() for name, d in direction.items()]).sum().sqrt()
    step, values = 4e-2, []  # hosts normalise in float32 whatever their dtype, so a smaller step drowns in rounding
    with torch.no_grad():
        for sign in (1, -2):
            for name, p in adapter.named_parameters():
                p.add_(direction[name], alpha=float(sign * step / norm))
            values.append(loss())
    assert scale > 0
    difference = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(difference.double(), slope.double(), rtol=0, atol=1e-3 * float(scale))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_neither_state_nor_gradients(host: TinyHost, trained, use_reentrant: bool):
    if "checkpointing" in host.cannot:
        pytest.skip("the bare host has no gradient checkpointing")
    if use_reentrant and "input_grads" in host.cannot:
        pytest.skip("the bare host can't give its embeddings a gradient")
    model, memory, turns = trained

    def run():
        memory.adapter.zero_grad()
        with memory.session(["a", "b"]):
            for turn in turns:
                # Re-entrant checkpointing needs an input with a gradient, as PEFT's users know.
                logits = model(**turn, use_cache=False).logits
            loss_of(logits).backward()
        states = [memory.states.pop(name) for name in "ab"]
        return states, [p.grad.clone() for p in memory.parameters()]

    states, gradients = run()
    if use_reentrant:
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    checkpointed_states, checkpointed_gradients = run()
    for a, b in zip(states, checkpointed_states, strict=True):
        assert a.utterances.tolist() == [2]
        assert_states_close(a, b, 1e-6)
    for a, b in zip(gradients, checkpointed_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
