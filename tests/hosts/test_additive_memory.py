"""A memory on streaming hosts. Audio is at every position, and the steps of one generate() are one utterance, which is
complete after each step."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mal_adapter import AttachedMemory, MemoryState, attach_memory
from mal_adapter.errors import SessionError
from tests.hosts.builders import ADDITIVE_HOSTS, AdditiveHost
from tests.hosts.probes import assert_states_close, random_adapter, same_bits, small_config, trace_layers

LAYER, TOKENS = 1, 7
OTHER_CACHES = pytest.mark.parametrize(
    "options", [{"cache_implementation": "static"}, {"use_cache": False}], ids=["static", "none"]
)


@pytest.fixture(params=ADDITIVE_HOSTS.values(), ids=ADDITIVE_HOSTS.keys())
def host(request: pytest.FixtureRequest) -> AdditiveHost:
    return request.param


@pytest.fixture
def model(host: AdditiveHost) -> PreTrainedModel:
    return host.build(num_layers=3)


@pytest.fixture
def memory(model: PreTrainedModel) -> Iterator[AttachedMemory]:
    with attach_memory(model, layer_idx=LAYER, adapter=random_adapter()) as memory:
        yield memory


@torch.no_grad()
def say(model: PreTrainedModel, speech: dict[str, Tensor], **options: Any) -> Any:
    options = {"do_sample": False, "return_dict_in_generate": True, "output_scores": True} | options
    return model.generate(**speech, **options)


def row(speech: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: value[index : index + 1] if value.dim() else value for name, value in speech.items()}


def assert_scores_close(a: Any, b: Any) -> None:
    for x, y in zip(a.scores, b.scores, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_detection(host: AdditiveHost, memory: AttachedMemory):
    assert (memory.host.layers, memory.host.audio_positions) == (host.layers_path, "every")


def test_a_fresh_adapter_gives_the_same_bits_as_no_memory(host: AdditiveHost, model: PreTrainedModel):
    speech = host.speech(model, [TOKENS, TOKENS])
    bare = say(model, speech)
    memory = attach_memory(model, layer_idx=LAYER, config=small_config())
    for _ in range(2):
        with memory.session(["a", "b"]):
            attached = say(model, speech)
        assert same_bits(attached.sequences, bare.sequences)
        assert all(same_bits(x, y) for x, y in zip(attached.scores, bare.scores, strict=True))
    assert memory.states["a"].utterances.tolist() == [2]
    assert any(weights.abs().max() > 0 for weights in memory.states["a"].weights)


def test_generate_is_one_utterance_of_all_its_positions_as_in_one_forward(
    host: AdditiveHost, model: PreTrainedModel, memory: AttachedMemory
):
    """Scores, states and token counts; the second turn has a past to read."""
    with memory.session(["a", "b"]):
        turns = [(speech, say(model, speech)) for speech in (host.speech(model, [TOKENS] * 2, seed=s) for s in (1, 2))]
    with memory.session(["c", "d"]), torch.no_grad():
        for speech, said in turns:
            logits = model(**host.transcribed(model, speech, said.sequences)).logits
            scores = torch.stack(said.scores, 1)
            torch.testing.assert_close(logits[:, -scores.shape[1] :].float(), scores, rtol=1e-4, atol=1e-4)
    fed = turns[0][1].sequences.shape[1] - 1
    for generated, forwarded in ("ac", "bd"):
        assert memory.states[generated].utterances.tolist() == [2]
        assert memory.states[generated].tokens.tolist() == [2 * fed]
        assert_states_close(memory.states[generated], memory.states[forwarded], 1e-5)
    assert not torch.equal(turns[0][1].scores[0], turns[1][1].scores[0])


def test_read_and_write_equal_the_adapters_causal_ones(
    host: AdditiveHost, model: PreTrainedModel, memory: AttachedMemory
):
    speech = host.speech(model, [TOKENS] * 2)
    with memory.disabled():
        inputs = host.transcribed(model, speech, say(model, speech).sequences)
        with torch.no_grad(), trace_layers(host.layers(model)) as bare:
            model(**inputs)
    hidden_states = next(call.hidden_out for call in bare if call.layer_idx == LAYER)
    with torch.no_grad():
        adapter, state = memory.adapter, memory.adapter.initial_state(2)
        corrected = hidden_states + adapter.read(state, hidden_states, causal=True)
        with memory.session(["a", "b"]), trace_layers(host.layers(model)) as attached:
            model(**inputs)
        output = next(call.hidden_out for call in attached if call.layer_idx == LAYER)
        torch.testing.assert_close(output, corrected, rtol=0, atol=1e-5 * float(corrected.abs().max()))
        expected = adapter.write(state, corrected, causal=True)
        assert (expected.weights[0] - adapter.write(state, corrected).weights[0]).abs().max() > 1e-4
    assert_states_close(MemoryState.stack([memory.states["a"], memory.states["b"]]), expected)


@OTHER_CACHES
def test_generate_gives_the_same_with_another_cache(
    host: AdditiveHost, model: PreTrainedModel, memory: AttachedMemory, options: dict[str, Any]
):
    runs = []
    for more in ({}, options):
        with memory.session([f"{more} a", f"{more} b"]):
            runs.append([say(model, host.speech(model, [TOKENS] * 2, seed=s), **more) for s in (1, 2)])
    for a, b in zip(*runs, strict=True):
        assert_scores_close(a, b)
    for name in "ab":
        assert memory.states[f"{options} {name}"].utterances.tolist() == [2]
        assert_states_close(memory.states[f"{options} {name}"], memory.states[f"{{}} {name}"], 1e-4)


def test_the_past_is_read_at_every_step(host: AdditiveHost, model: PreTrainedModel, memory: AttachedMemory):
    first, second = (host.speech(model, [TOKENS], seed=s) for s in (1, 2))
    with memory.session("alone"):
        alone = say(model, second)
    with memory.session("call"):
        say(model, first)
        after = say(model, second)
    assert all((x - y).abs().max() > 1e-3 for x, y in zip(alone.scores, after.scores, strict=True))
    with memory.session("call", write=False):
        again = [say(model, second) for _ in range(2)]
    assert memory.states["call"].utterances.tolist() == [2]
    assert_scores_close(*again)


def test_a_batch_of_sessions_equals_the_singles(host: AdditiveHost, model: PreTrainedModel, memory: AttachedMemory):
    speeches = [host.speech(model, [TOKENS, TOKENS], seed=s) for s in (1, 2)]
    with memory.session(["a", "b"]):
        together = [say(model, speech) for speech in speeches]
    for index, name in enumerate("ab"):
        with memory.session(f"{name} alone"):
            alone = [say(model, row(speech, index)) for speech in speeches]
        assert_states_close(memory.states[name], memory.states[f"{name} alone"], 1e-5)
        for batch, single in zip(together, alone, strict=True):
            assert torch.equal(batch.sequences[index], single.sequences[0])


@torch.no_grad()
def test_a_forward_ignores_padding(host: AdditiveHost, model: PreTrainedModel, memory: AttachedMemory):
    inputs, audio_mask = host.collate(model, [host.prompt([7], seed=1), host.prompt([4], seed=2)])
    with memory.disabled(), trace_layers(host.layers(model)) as bare:
        model(**inputs)
    with memory.session(["a", "b"]), trace_layers(host.layers(model)) as attached:
        model(**inputs)
    changed = (bare[LAYER].hidden_out != attached[LAYER].hidden_out).any(-1)
    assert torch.equal(changed, audio_mask)
    assert [int(memory.states[name].tokens) for name in "ab"] == [7, 4]


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_several_sequences_per_prompt_are_refused_and_nothing_is_written(
    host: AdditiveHost, model: PreTrainedModel, memory: AttachedMemory, options: dict[str, Any]
):
    """Each adds its own words to the audio, so no row has the utterance as the other rows process it."""
    speech = {n: int(v) if v.dim() == 0 else v for n, v in host.speech(model, [TOKENS]).items()}
    with memory.session("call"), pytest.raises(SessionError, match="one sequence per prompt"):
        say(model, speech, **options)
    assert "call" not in memory.states


def test_a_step_that_raises_keeps_what_earlier_steps_wrote(
    host: AdditiveHost, model: PreTrainedModel, memory: AttachedMemory
):
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ZeroDivisionError

    speech = host.speech(model, [TOKENS])
    handle = host.layers(model)[2].register_forward_hook(fail)
    with memory.session("call"), pytest.raises(ZeroDivisionError):
        say(model, speech)
    handle.remove()
    assert memory.states["call"].utterances.tolist() == [1]
    assert memory.states["call"].tokens.tolist() == [host.prefill + 1]
