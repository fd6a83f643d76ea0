"""What one utterance leaves for the next, in one dialogue and in a batch of dialogues.

Every test of this folder runs on every family of `builders.HOSTS`. The adapter is random rather than trained: its
residual is large, so a position that should not change and does is seen at once.
"""

import pytest
import torch
from transformers import PreTrainedModel

from tests.hosts.behaviour.common import SIDES, attach, greedy, state_after
from tests.hosts.builders import TinyHost
from tests.hosts.probes import assert_states_close, same_bits, trace_layers


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
def test_a_session_continues_from_its_last_state(host: TinyHost, model: PreTrainedModel):
    prompts = [host.prompt([5], seed=seed) for seed in range(3)]
    memory = attach(model)
    expected = state_after(host, model, memory, prompts)
    for prompt in prompts:
        with memory.session("in parts"):
            model(**host.collate(model, [prompt])[0])
    assert memory.states["in parts"].utterances.tolist() == [3]
    assert_states_close(memory.states["in parts"], expected, 0)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["as configured", "no cache"])
@torch.no_grad()
def test_repeated_audio_is_a_new_utterance_in_the_same_block_and_in_another(
    host: TinyHost, model: PreTrainedModel, options: dict[str, bool]
):
    """A follow-up question repeats the chat and its audio; so does a retry. Each generate() is one utterance."""
    prompt = host.prompt([5], seed=1)
    first, _ = host.collate(model, [prompt])
    follow_up = dict(first)
    text = torch.full((1, 3), int(first["input_ids"][0, -1]))
    for name, more in (("input_ids", text), ("attention_mask", torch.ones_like(text))):
        follow_up[name] = torch.cat((first[name], more), 1)
    memory = attach(model)
    turns = [first, follow_up, follow_up]
    with memory.session("one block"):
        for inputs in turns:
            greedy(model, inputs, **options)
    for inputs in turns:
        with memory.session("a block each"):
            greedy(model, inputs, **options)
    assert memory.states["one block"].utterances.tolist() == [3]
    assert_states_close(memory.states["one block"], memory.states["a block each"], 0)


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
    """In a call without audio the id is an ordinary token: the host embeds it and merges nothing."""
    inputs, _ = host.make_inputs(model, [[5]])
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs).logits
    memory = attach(model)
    with memory.session("call"):
        assert same_bits(model(**inputs).logits, logits)
    assert "call" not in memory.states or memory.states["call"].utterances.tolist() == [0]


@SIDES
@torch.no_grad()
def test_a_batch_of_sessions_equals_the_singles(host: TinyHost, model: PreTrainedModel, padding_side: str):
    if "batches" in host.cannot:
        pytest.skip("the host can't")
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
    """Sessions keep their own past when their rows and the other sessions change from batch to batch."""
    if "batches" in host.cannot:
        pytest.skip("the host can't")
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
def test_trap_07_the_state_stays_fp32_on_a_bf16_host(host: TinyHost):
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
