"""The tiny hosts behave like real ones: they run in all ways that users need, use their audio and keep rows apart."""

import copy
import dataclasses
import inspect
from collections.abc import Callable

import pytest
import torch

from tests.hosts.builders import WIDTH, PlainHost, TinyHost
from tests.hosts.probes import changing, trace_layers
from tests.hosts.tiny import CAPABILITIES


def test_the_path_leads_to_the_decoder_layers(host: TinyHost):
    model = host.build(num_layers=3)
    assert len(host.layers(model)) == 3
    assert model.config.get_text_config(decoder=True).hidden_size == WIDTH
    parameters = inspect.signature(model.get_submodule(host.multimodal_path).forward).parameters
    assert {"input_ids", host.feature_argument} <= parameters.keys()
    # A size whose name this version does not know would stay that of a real model.
    assert sum(parameter.numel() for parameter in model.parameters()) < 500_000


@torch.no_grad()
def test_the_host_itself_runs_forward_greedy_beams_and_several_sequences(host: TinyHost):
    model = host.build()
    inputs, audio_mask = host.make_inputs(model, [[4], [3]])
    batch, seq_len = audio_mask.shape
    assert model(**inputs).logits.shape == (batch, seq_len, model.config.get_text_config(decoder=True).vocab_size)
    for rows, options in ((1, {}), (1, {"num_beams": 2}), (2, {"num_beams": 2, "num_return_sequences": 2})):
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False, **options)
        assert ids.shape == (rows * batch, seq_len + 3)


@torch.no_grad()
def test_audio_reaches_later_positions_and_not_earlier_ones(host: TinyHost):
    model = host.build()
    inputs, audio_mask = host.make_inputs(model, [[4]])
    first = int(audio_mask[0].nonzero()[0])
    before = model(**inputs).logits
    another, _ = host.make_inputs(model, [[4]], seed=1)
    inputs[host.feature_argument] = another[host.feature_argument]
    after = model(**inputs).logits
    assert torch.equal(before[:, :first], after[:, :first])
    assert (before[:, first:] - after[:, first:]).abs().amax(-1).min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_padded_batch_equals_its_rows(host: TinyHost, padding_side: str):
    if "batches" in host.cannot:
        pytest.skip("the host can't")
    model = host.build()
    prompts = [host.prompt([7], seed=1), host.prompt([3, 5], seed=2), host.prompt([2], seed=3)]
    inputs, _ = host.collate(model, prompts, padding_side)
    together = model(**inputs).logits
    for row, prompt in enumerate(prompts):
        alone_inputs, audio_mask = host.collate(model, [prompt])
        assert audio_mask.sum() == prompt.audio_tokens
        alone = model(**alone_inputs).logits[0]
        real = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(together[row][real], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_beams_get_all_clips_of_a_prompt_only_if_the_host_keeps_them_together(host: TinyHost):
    if "several_clips" in host.cannot:
        pytest.skip("the host can't")
    model = host.build()
    inputs, _ = host.make_inputs(model, [[4, 4]])
    with trace_layers(host.layers(model)) as calls:
        for beams in (1, 2):
            model.generate(**inputs, max_new_tokens=1, do_sample=False, num_beams=beams)
    greedy, beam = (call.hidden_in for call in calls if call.layer_idx == 0)
    assert torch.allclose(beam, greedy.expand_as(beam), atol=1e-5) == host.keeps_clips_together


@torch.no_grad()
def test_bf16_runs_and_equal_seeds_give_equal_models(host: TinyHost):
    model, twin = host.build(torch.bfloat16, seed=5), host.build(torch.bfloat16, seed=5)
    inputs, _ = host.make_inputs(model, [[4], [2]])
    out = model(**inputs, output_hidden_states=True)
    logits = out.logits  # some hosts return them in float32
    assert {hidden_states.dtype for hidden_states in out.hidden_states} == {torch.bfloat16}
    assert logits.isfinite().all()
    assert torch.equal(logits, twin(**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("returns_tuple", [False, True])
def test_the_plain_host_is_causal(returns_tuple: bool):
    model = PlainHost(returns_tuple=returns_tuple)
    embeds = torch.randn(2, 7, WIDTH)
    before = model(embeds)
    embeds[:, 4] += 1
    after = model(embeds)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.isclose(before[:, 4:], after[:, 4:]).all(-1).any()


# ---------------------------------------------------------------------------------------------------- capabilities


@torch.no_grad()
def static_cache(host: TinyHost) -> None:
    model = host.build()
    inputs, _ = host.make_inputs(model, [[4], [3]])
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    dynamic = model.generate(**inputs, **options)
    static = model.generate(**inputs, **options, cache_implementation="static")
    assert torch.equal(static.sequences, dynamic.sequences)
    torch.testing.assert_close(static.scores, dynamic.scores, rtol=1e-4, atol=1e-4)


def checkpointing(host: TinyHost) -> None:
    model = host.build().train()
    inputs, _ = host.make_inputs(model, [[4], [3]])

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**inputs, use_cache=False).logits.square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(gradients(), plain, rtol=1e-4, atol=1e-6)


def input_grads(host: TinyHost) -> None:
    model = host.build().requires_grad_(False).train()
    inputs, _ = host.make_inputs(model, [[4], [3]])
    model.enable_input_require_grads()
    assert model(**inputs).logits.requires_grad


@torch.no_grad()
def hidden_states(host: TinyHost) -> None:
    model = host.build(num_layers=3)
    inputs, _ = host.make_inputs(model, [[4]])
    host.layers(model)[1].register_forward_hook(changing(lambda hidden_states: 2 * hidden_states), prepend=True)
    with trace_layers(host.layers(model), host.stream_idx) as calls:
        shown = model(**inputs, output_hidden_states=True).hidden_states
    assert torch.equal(host.stream(shown[2]), calls[1].hidden_out)


@torch.no_grad()
def several_clips(host: TinyHost) -> None:
    host = dataclasses.replace(host, cannot=frozenset())  # else the prompt would have one clip
    model = host.build()
    prompt = host.prompt([4, 4])
    rows, reverse = prompt.feature_rows, [row.flip(-1) for row in prompt.feature_rows]
    variants = (
        dataclasses.replace(prompt, feature_rows=r) for r in (rows, (reverse[0], *rows[1:]), (*rows[:-1], reverse[-1]))
    )
    said, *others = (model(**host.collate(model, [variant])[0]).logits[0, -1] for variant in variants)
    assert all((said - other).abs().max() > 1e-3 for other in others)


@torch.no_grad()
def batches(host: TinyHost) -> None:
    model = host.build()
    prompts = [host.prompt([4], seed=1), host.prompt([4], seed=2)]
    together = model(**host.collate(model, prompts)[0]).logits[:1]
    torch.testing.assert_close(together, model(**host.collate(model, prompts[:1])[0]).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def clips_on_a_cache(host: TinyHost) -> None:
    model = host.build()
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    first = model.generate(**host.make_inputs(model, [[6]])[0], **options)

    def second_turn(seed: int) -> torch.Tensor:
        inputs, _ = host.make_inputs(model, [[5]], seed=1)
        clip, _ = host.make_inputs(model, [[5]], seed=seed)
        inputs[host.feature_argument] = clip[host.feature_argument]
        inputs["input_ids"] = torch.cat((first.sequences, inputs["input_ids"]), dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        cache = copy.deepcopy(first.past_key_values)
        return model.generate(**inputs, **options, past_key_values=cache).logits[0]

    assert (second_turn(2) - second_turn(3)).abs().max() > 1e-3


CHECKS: dict[str, Callable[[TinyHost], None]] = {
    "static_cache": static_cache,
    "checkpointing": checkpointing,
    "hidden_states": hidden_states,
    "several_clips": several_clips,
    "batches": batches,
    "clips_on_a_cache": clips_on_a_cache,
    "input_grads": input_grads,
}
"""Each runs one of `CAPABILITIES` on a host without memory, and raises if the host can't do it or is wrong."""


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_host_without_memory_supports_all_that_its_literal_does_not_exclude(host: TinyHost, capability: str):
    if capability not in host.cannot:
        CHECKS[capability](host)
        return
    with pytest.raises((AssertionError, IndexError, RuntimeError, TypeError, ValueError)):
        CHECKS[capability](host)
