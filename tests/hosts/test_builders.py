"""The tiny hosts are worth testing on: they run every way users run them, hear their audio, batch without crosstalk."""

import inspect

import pytest
import torch

from tests.hosts.builders import AUDIO_TOKEN_ID, VOCAB_SIZE, WIDTH, PlainHost, TinyHost


def test_the_path_leads_to_the_decoder_layers(host: TinyHost):
    model = host.build(num_layers=3)
    assert len(host.layers(model)) == 3
    assert model.config.get_text_config(decoder=True).hidden_size == WIDTH
    parameters = inspect.signature(model.get_submodule(host.multimodal_path).forward).parameters
    assert {"input_ids", host.feature_argument} <= parameters.keys()


@torch.no_grad()
def test_the_bare_host_runs_forward_greedy_beams_and_several_sequences(host: TinyHost):
    model = host.build()
    inputs, audio_mask = host.make_inputs(model, [[4], [3]])
    batch, seq_len = audio_mask.shape
    assert model(**inputs).logits.shape == (batch, seq_len, VOCAB_SIZE)
    for rows, options in ((1, {}), (1, {"num_beams": 2}), (2, {"num_beams": 2, "num_return_sequences": 2})):
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False, **options)
        assert ids.shape == (rows * batch, seq_len + 3)


@torch.no_grad()
def test_audio_reaches_later_positions_and_not_earlier_ones(host: TinyHost):
    model = host.build()
    inputs, audio_mask = host.make_inputs(model, [[4]])
    first = int(audio_mask[0].nonzero()[0])
    before = model(**inputs).logits
    inputs[host.feature_argument] = inputs[host.feature_argument] * -1
    after = model(**inputs).logits
    assert torch.equal(before[:, :first], after[:, :first])
    assert (before[:, first:] - after[:, first:]).abs().amax(-1).min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_padded_batch_equals_its_rows(host: TinyHost, padding_side: str):
    model = host.build()
    prompts = [host.prompt([7], seed=1), host.prompt([3, 5], seed=2), host.prompt([2], seed=3)]
    inputs, _ = host.collate(model, prompts, padding_side)
    together = model(**inputs).logits
    for row, prompt in enumerate(prompts):
        alone_inputs, audio_mask = host.collate(model, [prompt])
        assert audio_mask.sum() == prompt.audio_tokens == (inputs["input_ids"][row] == AUDIO_TOKEN_ID).sum()
        alone = model(**alone_inputs).logits[0]
        real = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(together[row][real], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_bf16_runs_and_equal_seeds_give_equal_models(host: TinyHost):
    model, twin = host.build(torch.bfloat16, seed=5), host.build(torch.bfloat16, seed=5)
    inputs, _ = host.make_inputs(model, [[4], [2]])
    logits = model(**inputs).logits
    assert logits.dtype == torch.bfloat16
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
