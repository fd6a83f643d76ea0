"""`generate`: a prompt is written once, whatever is decoded from it.

Every test of this folder runs on every family of `builders.HOSTS`. The adapter is random rather than trained: its
residual is large, so a position that should not change and does is seen at once.
"""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.logits_process import LogitsProcessorList

from mal_adapter import AttachedMemory
from mal_adapter.errors import MalAdapterError
from tests.hosts.behaviour.common import LAYER, Force, attach, greedy, state_after
from tests.hosts.builders import AUDIO_TOKEN_ID, TinyHost
from tests.hosts.probes import assert_states_close, same_bits, trace_layers


@torch.no_grad()
def test_generate_writes_once_and_the_same_as_a_forward(host: TinyHost, model: PreTrainedModel):
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
    """The scores of a second utterance equal those of a loop of forward calls that only read."""
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
def test_trap_02_beams_and_sequences_write_once_per_prompt_the_same_as_greedy(
    host: TinyHost, model: PreTrainedModel, options: dict
):
    torch.manual_seed(0)
    prompts = [host.prompt([4], seed=1), host.prompt([3], seed=2)]
    inputs, audio_mask = host.collate(model, prompts)
    memory = attach(model)
    for _ in range(2):  # the second time every beam reads a past
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
    """transformers repeats each feature row in place: a beam would get the first clip twice and the second never."""
    if "several_clips" in host.cannot:
        pytest.skip("the host can't")
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
def test_trap_04_without_a_cache_the_utterance_is_written_once(host: TinyHost, model: PreTrainedModel):
    """Every step repeats all audio. Each must read the same past, and the write must happen once or be refused."""
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
def test_trap_03_a_static_cache_gives_the_same_memory_as_a_dynamic_one(host: TinyHost, model: PreTrainedModel):
    """Its masks have the cache's full length, so they are not those of the prompt."""
    if "static_cache" in host.cannot:
        pytest.skip("the host can't")
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
    # On the last layer the residual is in no key or value, so a decode step that adds none is that of the host itself.
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
def test_trap_06_a_second_turn_on_a_cache_writes_only_its_own_audio(host: TinyHost, model: PreTrainedModel):
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
    corrected = own_output + adapter.read(after_first, own_output, mask)
    assert_states_close(state, adapter.write(after_first, corrected[mask][None]), 1e-5)
    torch.testing.assert_close(second.hidden_out, corrected, rtol=0, atol=1e-5)


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
        pytest.skip("the host can't")
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
