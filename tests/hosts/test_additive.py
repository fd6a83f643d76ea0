"""The tiny additive hosts behave like real ones. The arguments of their forward distinguish an utterance's decode steps
from the next utterance."""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.hosts.builders import ADDITIVE_HOSTS, VOCAB_SIZE, WIDTH, AdditiveHost
from tests.hosts.probes import trace_layers
from tests.hosts.test_builders import CHECKS

LENGTH = 7
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_scores": True}


@pytest.fixture(params=ADDITIVE_HOSTS.values(), ids=ADDITIVE_HOSTS.keys())
def host(request: pytest.FixtureRequest) -> AdditiveHost:
    return request.param


def in_chunks(host: AdditiveHost, features: Tensor) -> Iterator[Tensor]:
    """The features of the prompt, then of each step, as they come from a microphone."""
    first, rest = host.prefill * host.frames_per_token, features.shape[-1] // host.frames_per_token - host.prefill
    yield from features.split([first] + [host.frames_per_token] * rest, dim=-1)


def test_the_path_leads_to_the_decoder_layers(host: AdditiveHost):
    model = host.build(num_layers=3)
    assert len(host.layers(model)) == 3
    assert model.config.get_text_config(decoder=True).hidden_size == WIDTH
    parameters = inspect.signature(model.get_submodule(host.multimodal_path).forward).parameters
    assert {"input_ids", host.feature_argument} <= parameters.keys()


@torch.no_grad()
def test_one_forward_has_the_scores_of_generate(host: AdditiveHost):
    model = host.build()
    speech = host.speech(model, [LENGTH, LENGTH])
    with trace_layers(host.layers(model)) as calls:
        turn = model.generate(**speech, **GREEDY)
    assert [call.hidden_in.shape[1] for call in calls if call.layer_idx == 0] == [host.prefill] + [1] * (
        len(turn.scores) - 1
    )
    inputs = host.transcribed(model, speech, turn.sequences)
    logits = model(**inputs).logits
    assert logits.shape == (2, turn.sequences.shape[1] - 1, VOCAB_SIZE)
    torch.testing.assert_close(logits[:, host.prefill - 1 :].unbind(1), turn.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"use_cache": False}],
    ids=["static cache", "no cache"],
)
@torch.no_grad()
def test_generate_gives_the_same_tokens_with_another_cache(host: AdditiveHost, options: dict[str, Any]):
    model = host.build()
    speech = host.speech(model, [LENGTH, LENGTH])
    expected, turn = (model.generate(**speech, **GREEDY, **more) for more in ({}, options))
    assert torch.equal(turn.sequences, expected.sequences)
    torch.testing.assert_close(turn.scores, expected.scores, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_audio_reaches_its_own_position_and_none_before(host: AdditiveHost):
    model = host.build()
    speech, other = (host.speech(model, [LENGTH], seed=seed) for seed in (1, 2))
    sequences = model.generate(**speech, do_sample=False)
    at = 4
    inputs, changed = (host.transcribed(model, audio, sequences) for audio in (speech, other))
    if host.codebooks:
        changed["input_ids"][:, :at] = inputs["input_ids"][:, :at]
    else:
        frames = at * host.frames_per_token
        changed["input_features"][..., :frames] = inputs["input_features"][..., :frames]
    with trace_layers(host.layers(model)) as calls:
        before, after = model(**inputs).logits, model(**changed).logits
    assert torch.equal(before[:, :at], after[:, :at])
    assert (before[:, at:] - after[:, at:]).abs().amax(-1).min() > 1e-3
    added = [call.hidden_in for call in calls if call.layer_idx == 0]
    assert (added[0][:, at:] - added[1][:, at:]).abs().amax(-1).min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_padded_batch_equals_its_rows(host: AdditiveHost, padding_side: str):
    model = host.build()
    prompts = [host.prompt([length], seed=length) for length in (7, 4, 2)]
    inputs, audio_mask = host.collate(model, prompts, padding_side)
    together = model(**inputs).logits
    assert audio_mask.sum(1).tolist() == [7, 4, 2]
    distance = 0.0
    for row, prompt in enumerate(prompts):
        alone = model(**host.collate(model, [prompt])[0]).logits[0]
        distance = max(distance, float((together[row][audio_mask[row]] - alone).abs().max()))
    assert (distance < 1e-4) == (padding_side == "right" or host.pads_left)


@torch.no_grad()
def test_a_short_clip_in_a_batch_is_followed_by_silence(host: AdditiveHost):
    """Up to its own end it equals the clip alone; no argument of the host says where that is."""
    model = host.build()
    speech = host.speech(model, [LENGTH, LENGTH - 3])
    short = {**speech, **{k: v[1:] for k, v in speech.items() if v.dim()}}
    argument = "input_values" if host.codebooks else "input_features"
    short[argument] = short[argument][..., : (LENGTH - 3) * short[argument].shape[-1] // LENGTH]
    together, alone = model.generate(**speech, **GREEDY), model.generate(**short, **GREEDY)
    assert len(together.scores) == len(alone.scores) + 3
    scores = tuple(score[1:] for score in together.scores[: len(alone.scores)])
    torch.testing.assert_close(scores, alone.scores, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_bf16_runs(host: AdditiveHost):
    model = host.build(torch.bfloat16)
    inputs, _ = host.make_inputs(model, [[4], [2]])
    assert model(**inputs).logits.dtype == torch.bfloat16
    turn = model.generate(**host.speech(model, [LENGTH]), **GREEDY)
    assert all(scores.isfinite().all() for scores in turn.scores)


@pytest.mark.parametrize("capability", ["checkpointing", "input_grads"])
def test_a_host_without_memory_supports_all_that_its_literal_does_not_exclude(host: AdditiveHost, capability: str):
    if capability not in host.cannot:
        CHECKS[capability](host)
        return
    with pytest.raises(RuntimeError):
        CHECKS[capability](host)


# --------------------------------------------------------------------------------------------- arguments of each call


def arrivals(module: nn.Module) -> tuple[list[dict[str, Any]], Any]:
    """The arguments of each call of `module` by name, and the length of the cache at the start of the call."""
    calls: list[dict[str, Any]] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        cache = call.get("past_key_values")
        # As a number: a static cache moves its counter in place.
        calls.append(dict(call) | {"past": None if cache is None else int(cache.get_seq_length())})

    return calls, module.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("path", ["", "model"], ids=["top", "inner"])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@torch.no_grad()
def test_a_step_comes_with_a_cache_that_holds_something_and_a_prompt_does_not(
    host: AdditiveHost, options: dict[str, Any], path: str
):
    model = host.build()
    calls, handle = arrivals(model.get_submodule(path))
    for seed in range(2):  # the second utterance starts with an empty cache again
        model.generate(**host.speech(model, [LENGTH, LENGTH], seed), **GREEDY, **options)
    handle.remove()
    steps = len(calls) // 2 - 1
    assert [call["past"] for call in calls] == 2 * [0, *range(host.prefill, host.prefill + steps)]
    assert [call["input_ids"].shape[1] for call in calls] == 2 * ([host.prefill] + [1] * steps)


@torch.no_grad()
def test_without_a_cache_each_step_repeats_all_earlier_positions(host: AdditiveHost):
    model = host.build()
    calls, handle = arrivals(model)
    model.generate(**host.speech(model, [LENGTH, LENGTH]), **GREEDY, use_cache=False)
    handle.remove()
    assert {call["past"] for call in calls} == {None}
    for shorter, longer in itertools.pairwise(calls):
        length = shorter["input_ids"].shape[1]
        assert longer["input_ids"].shape[1] == length + 1
        assert torch.equal(longer["input_ids"][:, :length], shorter["input_ids"])
        if not host.codebooks:
            frames = shorter["encoder_inputs_embeds"].shape[1]
            assert torch.equal(longer["encoder_inputs_embeds"][:, :frames], shorter["encoder_inputs_embeds"])


@torch.no_grad()
def test_each_call_has_the_audio_of_its_own_positions(host: AdditiveHost):
    """As codes in the ids; as features in forward and from a stream; already embedded in generate()."""
    model = host.build()
    speech = host.speech(model, [LENGTH, LENGTH])
    calls, handle = arrivals(model)
    sequences = model.generate(**speech, do_sample=False)
    if not host.codebooks:
        model.generate(**speech | {"input_features": in_chunks(host, speech["input_features"])}, do_sample=False)
    model(**host.transcribed(model, speech, sequences))
    handle.remove()
    for call in calls:
        length = call["input_ids"].shape[1]
        brought = [name for name in ("input_features", "encoder_inputs_embeds") if call.get(name) is not None]
        if host.codebooks:
            assert brought == []
            assert call["input_ids"].shape[2:] == (1 + host.codebooks,)
        elif brought == ["input_features"]:
            assert call["input_features"].shape[2] == host.frames_per_token * length
        else:
            assert brought == ["encoder_inputs_embeds"]
            assert call["encoder_inputs_embeds"].shape[1] == model.config.downsample_factor * length


@torch.no_grad()
def test_every_call_has_audio(host: AdditiveHost):
    model = host.build()
    ids = host.collate(model, [host.prompt([4])])[0]["input_ids"]
    with pytest.raises((RuntimeError, ValueError)):
        model(input_ids=ids[..., 0] if host.codebooks else ids)


@torch.no_grad()
def test_the_beams_of_a_prompt_share_the_audio_but_not_the_words(host: AdditiveHost):
    """So no single row of a decode step is that of the prompt."""
    model = host.build()
    with trace_layers(host.layers(model)) as calls:
        speech = host.speech(model, [LENGTH])
        if "num_delay_tokens" in speech:
            speech["num_delay_tokens"] = int(speech["num_delay_tokens"])  # 5.23 fails to repeat a tensor of no rows
        model.generate(**speech, do_sample=False, num_beams=2)
    prompt, *steps = (call.hidden_in for call in calls if call.layer_idx == 1)
    assert torch.equal(prompt[0], prompt[1])
    assert all((step[0] - step[1]).abs().max() > 1e-3 for step in steps)
