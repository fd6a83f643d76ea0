"""An adapter with several members answers with the mean of its members' answers, from one pass below the layer."""

import copy
import logging
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mal_adapter import MemoryAdapter, MemoryEnsemble, attach_memory
from mal_adapter.demo import ADAPTER_FOLDER, EMOTIONS, HOST_FOLDER, PROMPT
from mal_adapter.errors import ConfigError, SessionError, StateMismatchError
from mal_adapter.memory.ensemble import load_adapter
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
from tests.ser.training_world import make_dialogues


def make_members(count: int, seed: int = 0) -> list[MemoryAdapter]:
    """Adapters of the demo's host with random read-outs, which answer differently."""
    torch.manual_seed(seed)
    members = [MemoryAdapter.from_pretrained(ADAPTER_FOLDER) for _ in range(count)]
    with torch.no_grad():
        for member in members:
            for parameter in member.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return members


def recognizer_of(adapter, labels=EMOTIONS, **options) -> EmotionRecognizer:
    return EmotionRecognizer.from_pretrained(
        adapter, load_host(str(HOST_FOLDER)), labels=labels, prompt=PROMPT, **options
    )


def probabilities(recognizer, dialogues, batch_size=2):
    results = recognizer.recognize_many(dialogues, batch_size)
    return {
        (r.utterance.dialogue_id, r.utterance.utterance_id): torch.tensor(list(r.probabilities.values())).double()
        for r in results
    }


def largest_difference(found, members, dialogues) -> float:
    """Between the answers and the mean of the members' own recognisers."""
    alone = [probabilities(recognizer_of(member), dialogues) for member in members]
    assert max(float((alone[0][key] - alone[1][key]).abs().max()) for key in found) > 0.01  # the members do differ
    return max(float((found[key] - sum(one[key] for one in alone) / len(alone)).abs().max()) for key in found)


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    return make_dialogues(tmp_path_factory.mktemp("calls"), (3, 2, 4), "dev")


def count_calls(modules) -> list[int]:
    calls = [0]

    def count(*_):
        calls[0] += 1

    for module in modules:
        module.register_forward_hook(count)
    return calls


@given(count=st.integers(2, 3), seed=st.integers(0, 99), batch_size=st.integers(1, 3))
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_answers_are_the_mean_of_the_members(dialogues, count, seed, batch_size):
    members = make_members(count, seed)
    recognizer = recognizer_of(MemoryEnsemble(members))
    found = probabilities(recognizer, dialogues, batch_size)
    assert largest_difference(found, members, dialogues) < 1e-6
    state = recognizer.memory.states[dialogues[0].dialogue_id]
    assert (state.utterances.item(), len(state.weights)) == (3, count * len(members[0].initial))


def test_one_pass_below_the_layer_and_one_per_member_above(dialogues):
    recognizer = recognizer_of(MemoryEnsemble(make_members(3)))
    turns = dialogues[0].utterances
    recognizer.answer([turns[0]])  # checks that the host can start behind its lower layers
    layers = recognizer.memory.decoder_layers
    at = recognizer.memory.layer_idx
    towers = [module for name, module in recognizer.model.named_modules() if name.endswith("audio_tower")]
    encoder = count_calls(towers)
    below = count_calls([layer.self_attn for layer in layers[: at + 1]])
    above = count_calls([layer.self_attn for layer in layers[at + 1 :]])
    recognizer.answer([turns[1]])
    assert (encoder, below, above) == ([1], [at + 1], [3 * (len(layers) - at - 1)])
    assert not any("forward" in vars(layer) for layer in layers)


def test_labels_of_several_tokens_run_the_whole_host_per_member(dialogues, caplog):
    labels = ("neutral happy", "neutral sad", "angry")
    members = make_members(2)
    with caplog.at_level(logging.WARNING):
        recognizer = recognizer_of(MemoryEnsemble(members), labels)
        assert recognizer.labels_need_cache
        found = probabilities(recognizer, dialogues)
    alone = [probabilities(recognizer_of(member, labels), dialogues) for member in members]
    for key, mean in found.items():
        torch.testing.assert_close(mean, (alone[0][key] + alone[1][key]) / 2, rtol=0, atol=1e-6)
    assert [r.message for r in caplog.records if "whole host" in r.message] == [
        "each member of the memory runs the whole host, which takes longer: labels of several tokens need the cache of "
        "all layers"
    ]


def test_a_host_that_cannot_start_behind_its_layers_runs_as_a_whole(dialogues, caplog):
    members = make_members(2)
    model, processor = load_host(str(HOST_FOLDER))

    original = model.forward

    def forward(*args, **kwargs):
        if kwargs.get("input_features") is None:
            raise RuntimeError("this host always needs audio")
        return original(*args, **kwargs)

    model.forward = forward
    recognizer = EmotionRecognizer.from_pretrained(
        MemoryEnsemble(members), (model, processor), prompt=PROMPT, labels=EMOTIONS
    )
    with caplog.at_level(logging.WARNING):
        found = probabilities(recognizer, dialogues)
    assert sum("this host always needs audio" in r.message for r in caplog.records) == 1
    assert largest_difference(found, members, dialogues) < 1e-6


def test_a_loaded_folder_answers_as_what_was_saved(dialogues, tmp_path):
    members = make_members(2)
    ensemble = MemoryEnsemble(members)
    ensemble.save_pretrained(tmp_path / "adapter")
    assert load_adapter(tmp_path / "adapter").fingerprint() == ensemble.fingerprint()
    found = probabilities(recognizer_of(tmp_path / "adapter"), dialogues)
    expected = probabilities(recognizer_of(ensemble), dialogues)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_state_is_one_value_that_other_processes_continue(dialogues, tmp_path):
    members = make_members(2)
    turns = dialogues[0].utterances
    whole = recognizer_of(MemoryEnsemble(members))
    expected = [whole.answer([turn])[0].probabilities for turn in turns]
    found = []
    for turn in turns:  # a recogniser per utterance, as after a restart
        recognizer = recognizer_of(MemoryEnsemble(members), store=tmp_path / "states")
        found += [recognizer.answer([turn])[0].probabilities]
    assert found == expected
    assert [path.suffix for path in (tmp_path / "states").iterdir() if not path.name.startswith(".")] == [
        ".safetensors"
    ]
    state = recognizer.memory.states[turns[0].dialogue_id]
    for other in (members[0], MemoryEnsemble(members[::-1]), MemoryEnsemble(make_members(3))):
        with pytest.raises(StateMismatchError, match="adapter"):
            other.check_state(state)
    with pytest.raises(StateMismatchError, match="belongs to another adapter"):
        MemoryEnsemble(members).check_state(members[0].initial_state())


def test_reads_only_and_sessions_of_one_batch_are_isolated(dialogues):
    recognizer = recognizer_of(MemoryEnsemble(make_members(2)))
    first, second = (dialogue.utterances for dialogue in dialogues[:2])
    alone = [recognizer.answer([turn], session_ids=["alone"])[0].probabilities for turn in first[:2]]
    both = [
        recognizer.answer([first[turn], second[turn]], session_ids=["a", "b"])[0].probabilities for turn in range(2)
    ]
    assert both[1] == pytest.approx(alone[1], abs=1e-5)
    before = recognizer.memory.states["a"]
    recognizer.answer([first[0]], session_ids=["a"], write=False)
    assert recognizer.memory.states["a"].equals(before)


def test_a_member_that_fails_leaves_no_other_ahead(dialogues):
    recognizer = recognizer_of(MemoryEnsemble(make_members(2)))
    memory, turn = recognizer.memory, dialogues[0].utterances[0]
    recognizer.answer([turn], session_ids=["call"])
    before = memory.states["call"]

    def fail(*_, **__):
        raise RuntimeError("no memory left")

    second = memory.adapter.members[1]
    second.write_tokens = fail
    with pytest.raises(RuntimeError, match="no memory left"):
        recognizer.answer([turn], session_ids=["call"])
    assert memory.states["call"].equals(before)
    del second.write_tokens
    assert recognizer.answer([turn], session_ids=["call"])


def test_a_write_that_one_member_skips_is_skipped_by_all():
    ensemble = MemoryEnsemble(make_members(2)).eval()
    tokens = torch.randn(2, 5, ensemble.config.hidden_size)
    before = ensemble.initial_state(2)
    after = [m.write(part, tokens) for m, part in zip(ensemble.members, ensemble.split(before), strict=True)]
    broken = tokens.clone()
    broken[1] = float("nan")
    with torch.no_grad():
        after[1] = ensemble.members[1].write(ensemble.split(before)[1], broken)
    joined = ensemble.join(before, after)
    assert (joined.utterances.tolist(), joined.skipped_writes.tolist()) == ([1, 0], [0, 1])
    assert all(torch.equal(new[1], old[1]) for new, old in zip(joined.weights, before.weights, strict=True))
    for part, member in zip(ensemble.split(joined), after, strict=True):
        assert all(torch.equal(a[0], b[0]) for a, b in zip(part.weights, member.weights, strict=True))


def test_threads_answer_as_one_after_the_other(dialogues):
    recognizer = recognizer_of(MemoryEnsemble(make_members(2)))
    expected = probabilities(recognizer, dialogues, batch_size=1)
    found, bare = {}, []
    turn = dialogues[0].utterances[0]
    alone = recognizer.without_memory()
    answer = alone.answer([turn])[0].probabilities

    def run(dialogue):
        for result in recognizer.recognize(dialogue):
            key = result.utterance.dialogue_id, result.utterance.utterance_id
            found[key] = torch.tensor(list(result.probabilities.values())).double()

    threads = [threading.Thread(target=run, args=(dialogue,)) for dialogue in dialogues]
    threads.append(threading.Thread(target=lambda: bare.extend(alone.answer([turn])[0] for _ in range(10))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.keys() == expected.keys()
    assert max(float((found[key] - expected[key]).abs().max()) for key in expected) < 1e-6
    assert [one.probabilities for one in bare] == [answer] * 10


def test_a_forward_of_the_caller_is_refused_with_what_to_do(dialogues):
    recognizer = recognizer_of(MemoryEnsemble(make_members(2)))
    inputs = recognizer.prepare([dialogues[0].utterances[0]]).inputs
    with (
        recognizer.memory.session("call"),
        pytest.raises(SessionError, match=r"2 members.*EmotionRecognizer.*members\[0\]"),
    ):
        recognizer.model(**inputs)
    assert "call" not in recognizer.memory.states
    one = recognizer.memory.adapter.members[0]
    recognizer.memory.detach()
    with attach_memory(recognizer.model, adapter=one) as memory, memory.session("call"), torch.no_grad():
        recognizer.model(**inputs)
    assert memory.states["call"].utterances.item() == 1


def test_members_must_fit_together():
    one, two = make_members(2)
    with pytest.raises(ConfigError, match="expected 2 to 64 MemoryAdapter, got 1: MemoryAdapter"):
        MemoryEnsemble([one])
    two.metadata = two.metadata.with_task(("calm", "upset"), "?")
    with pytest.raises(ConfigError, match="the task of member 1"):
        MemoryEnsemble([one, two])
    other = copy.deepcopy(one)
    other.start_gates(7)
    with pytest.raises(ConfigError, match="the configuration of member 1"):
        MemoryEnsemble([one, other])
