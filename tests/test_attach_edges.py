"""Moments that need care: retries, exceptions, caches that are off, state that is carried over, numbers."""

import contextlib
import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mal_adapter import AttachedMemory, MemoryAdapter, MemoryState, attach_memory
from mal_adapter.errors import (
    AudioMaskError,
    AudioOutsideSessionWarning,
    HostError,
    SessionError,
    StateMismatchError,
)
from tests.hosts.builders import HOSTS, Prompt, TinyHost
from tests.hosts.probes import assert_states_close, hook_census, random_adapter, same_bits, trace_layers

LAYER = 1


@pytest.fixture(params=["qwen2_audio", "voxtral", "phi4_multimodal"])
def host(request: pytest.FixtureRequest) -> TinyHost:
    return HOSTS[request.param]


@pytest.fixture
def model(host: TinyHost) -> PreTrainedModel:
    return host.build(num_layers=3)


def attach(model: nn.Module, layer_idx: int = LAYER, **options: Any) -> AttachedMemory:
    return attach_memory(model, layer_idx=layer_idx, **({"adapter": random_adapter()} | options))


def speak(host: TinyHost, model: nn.Module, *prompts: Prompt, **more: Any) -> Tensor:
    return model(**host.collate(model, list(prompts))[0], **more).logits


def dialogue(
    host: TinyHost, model: nn.Module, memory: AttachedMemory, prompts: list[Prompt], name: str = "expected"
) -> MemoryState:
    with torch.no_grad(), memory.session(name):
        for prompt in prompts:
            speak(host, model, prompt)
    return memory.states[name]


def longer(prompt: Prompt, words: int = 3) -> Prompt:
    """The same audio and beginning, with more text behind it."""
    return Prompt(torch.cat((prompt.ids, torch.arange(1, words + 1))), prompt.feature_rows)


# ------------------------------------------------------------------------------------ failures, and what follows them


@torch.no_grad()
def test_a_retry_after_a_failure_is_written_though_its_prompt_is_longer(host: TinyHost, model: PreTrainedModel):
    """The failed prompt was never heard, so its extension is no repetition of it."""
    prompt = host.prompt([5], seed=1)
    memory = attach(model)
    expected = dialogue(host, model, memory, [longer(prompt)])

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with memory.session("call"):
        broken = host.layers(model)[2].register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            speak(host, model, prompt)
        broken.remove()
        speak(host, model, longer(prompt))
    assert "call" in memory.states
    assert_states_close(memory.states["call"], expected, 1e-6)


@torch.no_grad()
def test_a_failure_after_the_inner_model_commits_nothing_either(host: TinyHost, model: PreTrainedModel):
    """The top-level forward counts: its head comes after the module that merges audio and runs the layers."""
    prompts = [host.prompt([5], seed=1), host.prompt([4], seed=2)]
    memory = attach(model)
    before = dialogue(host, model, memory, prompts[:1], "call")

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    broken = model.get_output_embeddings().register_forward_hook(fail)
    with memory.session("call"), pytest.raises(ZeroDivisionError):
        speak(host, model, prompts[1])
    broken.remove()
    assert_states_close(memory.states["call"], before, 0)


@torch.no_grad()
def test_an_interrupt_in_a_forward_does_not_spoil_the_next_one_however_it_is_called(
    host: TinyHost, model: PreTrainedModel
):
    """Torch runs no hooks after a KeyboardInterrupt; the next call may be of the inner model."""
    first, second = host.prompt([5], seed=1), host.prompt([4], seed=2)
    memory = attach(model)
    expected = dialogue(host, model, memory, [second])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with memory.session("call"):
        broken = host.layers(model)[2].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            speak(host, model, first)
        broken.remove()
        model.get_submodule(host.multimodal_path)(**host.collate(model, [second])[0])
    assert "call" in memory.states
    assert_states_close(memory.states["call"], expected, 1e-6)


@torch.no_grad()
def test_a_call_that_fails_before_it_reaches_the_inner_model_does_not_claim_the_next_one(
    host: TinyHost, model: PreTrainedModel
):
    if not host.multimodal_path:
        pytest.skip("there is no inner model to call")
    prompt = host.prompt([5], seed=1)
    memory = attach(model)
    expected = dialogue(host, model, memory, [prompt])

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with memory.session("call"):
        broken = model.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            speak(host, model, prompt)
        broken.remove()
        model.get_submodule(host.multimodal_path)(**host.collate(model, [prompt])[0])
    assert_states_close(memory.states["call"], expected, 1e-6)


@torch.no_grad()
def test_the_inner_model_alone_reads_and_writes_once(host: TinyHost, model: PreTrainedModel):
    prompts = [host.prompt([5], seed=1), host.prompt([4], seed=2)]
    memory = attach(model)
    expected = dialogue(host, model, memory, prompts)
    with memory.session("call"):
        for prompt in prompts:
            model.get_submodule(host.multimodal_path)(**host.collate(model, [prompt])[0])
    assert_states_close(memory.states["call"], expected, 0)


@torch.no_grad()
def test_the_same_utterance_twice_is_two_utterances_whatever_was_generated_between(
    host: TinyHost, model: PreTrainedModel
):
    """Even where the last generated token is the one every prompt begins with, and its step carries the features."""
    prompt = host.prompt([4], seed=1)
    inputs, _ = host.collate(model, [prompt])
    memory = attach(model)
    expected = dialogue(host, model, memory, [prompt, prompt])
    banned = [[token] for token in range(64) if token != int(prompt.ids[0])]
    with memory.session("call"):
        for _ in range(2):
            model.generate(**inputs, max_new_tokens=3, do_sample=False, bad_words_ids=banned)
    assert_states_close(memory.states["call"], expected, 1e-6)


@torch.no_grad()
def test_a_longer_prompt_with_other_audio_is_another_utterance(host: TinyHost, model: PreTrainedModel):
    first, other = host.prompt([4], seed=1), host.prompt([4], seed=2)
    second = longer(Prompt(first.ids, other.feature_rows))
    memory = attach(model)
    with memory.session("call"):
        speak(host, model, first, use_cache=False)
        speak(host, model, second, use_cache=False)
    assert memory.states["call"].utterances.tolist() == [2]


@torch.no_grad()
def test_the_same_audio_in_a_longer_prompt_of_other_words_is_another_utterance(host: TinyHost, model: PreTrainedModel):
    first = host.prompt([4], seed=1)
    second = longer(first)
    second.ids[0] = 1 + second.ids[0] % 5
    memory = attach(model)
    with memory.session("call"):
        speak(host, model, first, use_cache=False)
        speak(host, model, second, use_cache=False)
    assert memory.states["call"].utterances.tolist() == [2]


@torch.no_grad()
def test_a_conversation_fed_again_with_a_new_clip_is_another_utterance(host: TinyHost, model: PreTrainedModel):
    """Without a cache the next turn's prompt begins with the last one, words and sound."""
    first, new = host.prompt([4], seed=1), host.prompt([6], seed=2)
    second = Prompt(torch.cat((first.ids, new.ids)), (*first.feature_rows, *new.feature_rows))
    memory = attach(model)
    with memory.session("call"):
        speak(host, model, first, use_cache=False)
        speak(host, model, second, use_cache=False)
    state = memory.states["call"]
    assert state.utterances.tolist() == [2]
    assert state.tokens.tolist() == [2 * first.audio_tokens + new.audio_tokens]


# ------------------------------------------------------------------------------------------------- without a cache


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@torch.no_grad()
def test_generate_without_a_cache_scores_as_with_one(host: TinyHost, model: PreTrainedModel, options: dict[str, Any]):
    prompts = [host.prompt([4], seed=1), host.prompt([3], seed=2)]
    inputs, _ = host.collate(model, prompts)
    memory = attach(model)
    runs = []
    for use_cache in (True, False):
        names = [f"{use_cache} {row}" for row in range(2)]
        with memory.session(names):
            for _ in range(2):
                out = model.generate(
                    **inputs,
                    **options,
                    use_cache=use_cache,
                    max_new_tokens=3,
                    do_sample=False,
                    return_dict_in_generate=True,
                    output_scores=True,
                )
        runs.append((out, [memory.states[name] for name in names]))
    (cached, states), (uncached, states_uncached) = runs
    for a, b in zip(cached.scores, uncached.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for a, b in zip(states, states_uncached, strict=True):
        assert a.utterances.tolist() == [2]
        assert_states_close(a, b, 1e-5)


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}],
    ids=["static cache", "prompt lookup"],
)
@torch.no_grad()
def test_other_ways_to_generate_write_once_what_greedy_writes(
    host: TinyHost, model: PreTrainedModel, options: dict[str, Any]
):
    """A static cache has masks of its full length, a look-up verifies several tokens at once."""
    inputs, _ = host.collate(model, [host.prompt([4], seed=1)])
    memory = attach(model)
    results = []
    for name, more in (("greedy", {}), ("other", options)):
        with memory.session(name):
            results.append([model.generate(**inputs, **more, max_new_tokens=4, do_sample=False) for _ in range(2)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert memory.states["other"].utterances.tolist() == [2]
    assert_states_close(memory.states["other"], memory.states["greedy"], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_two_prompts_whose_audio_is_almost_alike_are_two_prompts(host: TinyHost, dtype: torch.dtype):
    """Two takes of a silence under one id by mistake: the second must not be taken for a beam and dropped."""
    model = host.build(dtype, num_layers=3)
    prompt = host.prompt([4], seed=1)
    other = Prompt(prompt.ids, tuple(1.01 * row for row in prompt.feature_rows))
    memory = attach(model)
    with memory.session("call"), pytest.raises((SessionError, AudioMaskError)):
        speak(host, model, prompt, other)


@torch.no_grad()
def test_a_users_mask_serves_generate_without_a_cache(host: TinyHost, model: PreTrainedModel):
    """The prompt grows by a token at each step, so the mask fits the first step only."""
    first, second = host.prompt([6], seed=1), host.prompt([4], seed=2)
    inputs, audio_mask = host.collate(model, [second])
    memory = attach(model)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    for name in ("detected", "told"):
        dialogue(host, model, memory, [first], name)
    with memory.session("detected"):
        detected = model.generate(**inputs, **options)
    with memory.session("told", audio_mask=audio_mask):
        told = model.generate(**inputs, **options, use_cache=False)
    assert_states_close(memory.states["told"], memory.states["detected"], 1e-5)
    for a, b in zip(detected.scores, told.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_users_mask_serves_generate_with_cache_and_beams(host: TinyHost, model: PreTrainedModel):
    prompts = [host.prompt([4], seed=1), host.prompt([3], seed=2)]
    inputs, audio_mask = host.collate(model, prompts)
    memory = attach(model)
    with memory.session(["a", "b"]):
        expected = model.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=False)
    with memory.session(["told a", "told b"], audio_mask=audio_mask):
        told = model.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=False)
    assert torch.equal(told, expected)
    for name in "ab":
        assert_states_close(memory.states[f"told {name}"], memory.states[name], 0)


@torch.no_grad()
def test_text_of_any_length_passes_under_a_users_mask(host: TinyHost, model: PreTrainedModel):
    inputs, audio_mask = host.make_inputs(model, [[4]])
    text, _ = host.make_inputs(model, [[]])
    longer = {name: torch.cat([value] * 3, dim=1) for name, value in text.items()}
    memory = attach(model)
    with memory.disabled():
        bare = model(**longer).logits
    with memory.session("call", audio_mask=audio_mask):
        model(**inputs)
        state = memory.states["call"]
        assert same_bits(model(**longer).logits, bare)
    assert memory.states["call"].equals(state)


@torch.no_grad()
def test_one_clip_under_two_questions_is_two_prompts(host: TinyHost, model: PreTrainedModel):
    inputs, _ = host.make_inputs(model, [[4]])
    twice = {name: value.repeat_interleave(2, dim=0) for name, value in inputs.items()}
    twice["input_ids"][1, -1] = 1 + twice["input_ids"][1, -1] % 3
    memory = attach(model)
    with memory.session("call"), pytest.raises(SessionError, match="not copies"):
        model(**twice)
    assert "call" not in memory.states


@torch.no_grad()
def test_new_audio_that_a_users_mask_does_not_fit_is_not_dropped_in_silence(host: TinyHost, model: PreTrainedModel):
    first, second = host.prompt([4], seed=1), host.prompt([4], text=(6, 2, 4), seed=2)
    _, audio_mask = host.collate(model, [first])
    memory = attach(model)
    with memory.session("call", audio_mask=audio_mask):
        speak(host, model, first)
        with pytest.raises(AudioMaskError, match=str(len(second.ids))):
            speak(host, model, second)


# ------------------------------------------------------------------------------------------------------- the session


@torch.no_grad()
def test_a_memory_detached_inside_its_session_leaves_the_host_bare(host: TinyHost, model: PreTrainedModel):
    prompt = host.prompt([4], seed=1)
    bare, census = speak(host, model, prompt), hook_census(model)
    memory = attach(model)
    with memory.session("call"):
        speak(host, model, prompt)
        memory.detach()
        assert same_bits(speak(host, model, prompt), bare)
    assert hook_census(model) == census
    assert memory.states["call"].utterances.tolist() == [1]
    with pytest.raises(SessionError, match="detached"), memory.session("call"):
        pass


@torch.no_grad()
def test_an_exception_closes_the_session_and_keeps_what_was_written(host: TinyHost, model: PreTrainedModel):
    prompt = host.prompt([4], seed=1)
    memory = attach(model)
    with contextlib.suppress(ZeroDivisionError), memory.session("call"):
        speak(host, model, prompt)
        raise ZeroDivisionError
    expected = dialogue(host, model, memory, [prompt, prompt])
    with memory.session("call"):
        speak(host, model, prompt)
    assert_states_close(memory.states["call"], expected, 0)


@torch.no_grad()
def test_a_state_can_be_carried_over_forked_and_dropped(host: TinyHost, model: PreTrainedModel):
    prompts = [host.prompt([4], seed=seed) for seed in range(3)]
    memory = attach(model)
    expected = dialogue(host, model, memory, prompts)
    halfway = dialogue(host, model, memory, prompts[:2], "here")
    assert halfway.batch_size == 1
    memory.states["there"] = MemoryState.from_bytes(halfway.to_bytes())
    for name in ("here", "there"):
        assert_states_close(dialogue(host, model, memory, prompts[2:], name), expected, 0)
    assert halfway.utterances.tolist() == [2]  # a value: what was taken out does not change
    del memory.states["here"]
    fresh = dialogue(host, model, memory, prompts[:1], "here")
    assert fresh.utterances.tolist() == [1]
    other = attach(model, 2, adapter=random_adapter(seed=9))
    with pytest.raises(StateMismatchError):
        other.states["there"] = memory.states["there"]


@torch.no_grad()
def test_what_one_turn_writes_the_next_turn_of_a_sequence_of_blocks_reads_in_any_grouping(
    host: TinyHost, model: PreTrainedModel
):
    """A dialogue served alone, then in a batch, then alone."""
    mine = [host.prompt([4], seed=seed) for seed in range(3)]
    guest = host.prompt([7], seed=50)
    memory = attach(model)
    expected = dialogue(host, model, memory, mine)
    dialogue(host, model, memory, mine[:1], "mine")
    with memory.session(["guest", "mine"]):
        speak(host, model, guest, mine[1])
    dialogue(host, model, memory, mine[2:], "mine")
    assert_states_close(memory.states["mine"], expected, 1e-5)


def test_a_layer_has_one_memory_at_a_time(host: TinyHost, model: PreTrainedModel):
    memory = attach(model)
    census = hook_census(model)
    with pytest.raises(HostError, match="detach"):
        attach(model)
    assert hook_census(model) == census
    memory.detach()
    attach(model).detach()


def test_legacy_prompts_with_one_id_per_clip_are_refused():
    """Qwen2-Audio grows them inside forward, so the ids no longer say where the audio is."""
    host = HOSTS["qwen2_audio"]
    model = host.build()
    prompt = host.prompt([5], seed=1)
    keep = (prompt.ids != 60) | (torch.cumsum(prompt.ids == 60, 0) == 1)
    inputs, _ = host.collate(model, [Prompt(prompt.ids[keep], prompt.feature_rows)])
    memory = attach(model)
    with torch.no_grad(), memory.session("call"):
        with pytest.raises(AudioMaskError) as raised:
            model(**inputs)
        assert str(len(prompt.ids)) in str(raised.value)
        assert "call" not in memory.states
        grown = (prompt.ids == 60)[None]
    with torch.no_grad(), memory.session("call", audio_mask=grown):
        model(**inputs)
    assert memory.states["call"].tokens.tolist() == [5]


# ---------------------------------------------------------------------------------------------------------- numbers


@torch.no_grad()
def test_under_a_half_precision_host_the_memory_is_that_of_fp32_within_rounding(host: TinyHost):
    """bf16 hidden states carry 8 bits; the state built on them is fp32 and as good as they are."""
    prompts = [host.prompt([4], seed=seed) for seed in range(4)]
    states = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = host.build(dtype, num_layers=3)
        states.append(dialogue(host, model, attach(model), prompts))
    exact, bf16, fp16 = (torch.cat([w.flatten() for w in state.weights]) for state in states)
    assert (bf16 - exact).norm() < 0.1 * exact.norm()
    assert (fp16 - exact).norm() < 0.02 * exact.norm()


@torch.no_grad()
def test_an_adapter_in_half_precision_keeps_its_state_in_fp32(host: TinyHost):
    model = host.build(torch.bfloat16, num_layers=3)
    memory = attach(model, adapter=random_adapter().to(torch.bfloat16))
    state = dialogue(host, model, memory, [host.prompt([4], seed=seed) for seed in range(3)])
    assert {t.dtype for t in (*state.weights, *state.momentum)} == {torch.float32}
    assert state.utterances.tolist() == [3]


@torch.no_grad()
def test_one_row_that_is_not_finite_does_not_touch_the_others(host: TinyHost, model: PreTrainedModel):
    good, bad = host.prompt([4], seed=1), host.prompt([4], seed=2)
    poisoned = Prompt(bad.ids, tuple(torch.full_like(row, torch.nan) for row in bad.feature_rows))
    memory = attach(model)
    expected = dialogue(host, model, memory, [good])
    with warnings.catch_warnings(), memory.session(["good", "bad"]):
        warnings.simplefilter("ignore")
        speak(host, model, good, poisoned)
    assert_states_close(memory.states["good"], expected, 1e-5)
    assert memory.states["bad"].skipped_writes.tolist() == [1]
    assert memory.states["bad"].utterances.tolist() == [0]
    assert all((t == 0).all() for t in memory.states["bad"].weights)


@torch.no_grad()
def test_a_long_dialogue_keeps_its_size_and_stays_finite(host: TinyHost, model: PreTrainedModel):
    memory = attach(model)
    prompts = [host.prompt([4], seed=seed) for seed in range(5)]
    before = dialogue(host, model, memory, prompts, "call").nbytes
    for _ in range(9):
        dialogue(host, model, memory, prompts, "call")
    state = memory.states["call"]
    assert state.nbytes == before
    assert state.utterances.tolist() == [50]
    assert all(t.isfinite().all() for t in (*state.weights, *state.momentum))


@torch.no_grad()
def test_a_state_of_another_adapter_or_without_numbers_is_refused_and_none_is_lost(
    host: TinyHost, model: PreTrainedModel
):
    memory = attach(model)
    with memory.session("call"):
        model(**host.make_inputs(model, [[4]])[0])
    kept = memory.states["call"]
    for other, message in (
        (random_adapter(seed=1).initial_state(), "load the adapter it belongs to"),
        (random_adapter(memory_dim=32).initial_state(), "another adapter"),
        (kept.to("meta"), "meta device"),
    ):
        with pytest.raises(StateMismatchError, match=message):
            memory.states["call"] = other
    assert memory.states["call"] is kept


def test_the_status_tells_what_happened(host: TinyHost, model: PreTrainedModel):
    memory = attach(model)
    dialogue(host, model, memory, [host.prompt([4], seed=1)], "a")
    status = memory.status()
    assert status["attached"]
    assert "1 session" in status["states"]
    assert status["layer"] == f"{host.layers_path}.{LAYER}"
    assert str(LAYER) in repr(memory)
    memory.detach()
    assert not memory.status()["attached"]


@torch.no_grad()
def test_a_memory_moves_with_its_adapter_from_host_to_host(host: TinyHost, model: PreTrainedModel):
    """Detached, saved state and adapter serve on a second copy of the same checkpoint."""
    prompts = [host.prompt([4], seed=seed) for seed in range(3)]
    twin = copy.deepcopy(model)
    memory = attach(model)
    expected = dialogue(host, model, memory, prompts)
    carried = dialogue(host, model, memory, prompts[:2], "carried")
    memory.detach()
    again = attach_memory(twin, adapter=memory.adapter)  # layer_idx comes with the adapter
    assert again.layer_idx == LAYER
    again.states["carried"] = carried
    assert_states_close(dialogue(host, twin, again, prompts[2:], "carried"), expected, 0)


@torch.no_grad()
def test_the_trace_sees_nothing_new_between_utterances(host: TinyHost, model: PreTrainedModel):
    """After a session the very same forward is the bare one: nothing of the dialogue stays in the host."""
    prompt = host.prompt([4], seed=1)
    with trace_layers(host.layers(model)) as bare:
        speak(host, model, prompt)
    memory = attach(model)
    dialogue(host, model, memory, [prompt])
    with warnings.catch_warnings(), trace_layers(host.layers(model)) as after:
        warnings.simplefilter("ignore", AudioOutsideSessionWarning)
        speak(host, model, prompt)
    for a, b in zip(bare, after, strict=True):
        assert same_bits(a.hidden_out, b.hidden_out)


def test_a_given_adapter_is_used_as_it_is(host: TinyHost, model: PreTrainedModel):
    adapter = random_adapter()
    before = {name: t.clone() for name, t in adapter.state_dict().items()}
    memory = attach(model, adapter=adapter)
    assert memory.adapter is adapter
    assert isinstance(memory.adapter, MemoryAdapter)
    dialogue(host, model, memory, [host.prompt([4], seed=1)])
    assert all(torch.equal(before[name], t) for name, t in adapter.state_dict().items())
    assert not any(module is adapter for module in model.modules())
