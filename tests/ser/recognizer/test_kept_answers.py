"""A recogniser whose memory keeps answers: each answer is written once, whichever way the utterances come."""

import dataclasses

import pytest
import torch

from mal_adapter import MemoryAdapter, MemoryConfig, MemoryEnsemble
from mal_adapter.demo import EMOTIONS, HOST_FOLDER, PROMPT
from mal_adapter.errors import ConfigError, LabelError
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
from mal_adapter.stores import FolderStore
from mal_adapter.vllm.checks import servable
from tests.ser.training_world import make_dialogues


def make_adapter(seed=0, **changes):
    """An adapter of the demo's host that keeps answers, and whose read-out is not zero."""
    torch.manual_seed(seed)
    adapter = MemoryAdapter(
        MemoryConfig(**{"hidden_size": 96, "memory_dim": 16, "num_heads": 2, "num_labels": 4, **changes})
    )
    with torch.no_grad():
        adapter.readout_out.weight.normal_(std=0.3)
        adapter.answers.out_proj.weight.normal_(std=0.05)
    adapter.metadata = dataclasses.replace(
        adapter.metadata, layer_idx=1, task={"labels": list(EMOTIONS), "prompt": PROMPT}
    )
    return adapter.eval()


def recognizer_of(adapter, **options):
    return EmotionRecognizer.from_pretrained(adapter, load_host(str(HOST_FOLDER)), **options)


def probabilities(results):
    return {
        (r.utterance.dialogue_id, r.utterance.utterance_id): torch.tensor(list(r.probabilities.values()))
        for r in results
    }


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    return make_dialogues(tmp_path_factory.mktemp("calls"), (3, 2, 4), "dev")


def test_the_state_has_the_decayed_sums_of_the_answers(dialogues):
    adapter = make_adapter()
    recognizer = recognizer_of(adapter)
    found = [torch.tensor(list(r.probabilities.values())) for r in recognizer.recognize(dialogues[2])]
    state = recognizer.memory.states[dialogues[2].dialogue_id]
    sums = adapter.answers.initial(1, state.device, torch.float32)
    for row in found:
        sums = adapter.answers.write(sums, row[None])
    torch.testing.assert_close(state.answers, sums)
    assert state.utterances.item() == len(found) == 4


def test_past_answers_change_the_next_one(dialogues):
    keeps, forgets = make_adapter(), make_adapter()
    with torch.no_grad():
        forgets.answers.out_proj.weight.zero_()
    one, other = (probabilities(recognizer_of(a).recognize(dialogues[2])) for a in (keeps, forgets))
    first, *later = one
    assert torch.equal(one[first], other[first])
    assert all(float((one[key] - other[key]).abs().max()) > 1e-4 for key in later)


@pytest.mark.parametrize("members", [1, 2])
def test_every_way_to_answer_gives_the_same(dialogues, tmp_path, members):
    adapter = make_adapter() if members == 1 else MemoryEnsemble([make_adapter(seed) for seed in range(members)])
    recognizer = recognizer_of(adapter)
    alone = {key: p for d in dialogues for key, p in probabilities(recognizer.recognize(d)).items()}
    together = probabilities(recognizer.recognize_many(dialogues, batch_size=3))

    states, from_states = [None] * len(dialogues), {}
    for turn in range(4):
        rows = [n for n, dialogue in enumerate(dialogues) if turn < len(dialogue.utterances)]
        continued = recognizer.answer_from([dialogues[n].utterances[turn] for n in rows], [states[n] for n in rows])
        from_states |= probabilities(one.result for one in continued)
        for n, one in zip(rows, continued, strict=True):
            states[n] = one.state

    saved = {}
    for dialogue in dialogues:
        for utterance in dialogue.utterances:  # each in a new process, as it were
            stored = recognizer_of(adapter, store=FolderStore(tmp_path / "store"))
            saved |= probabilities(stored.answer([utterance]))
            stored.memory.detach()
    for other in (together, from_states, saved):
        assert other.keys() == alone.keys()
        assert max(float((other[key] - alone[key]).abs().max()) for key in alone) < 1e-5


def test_reading_alone_writes_no_answer(dialogues):
    recognizer = recognizer_of(make_adapter())
    first, second = dialogues[0].utterances[:2]
    recognizer.answer([first])
    before = recognizer.memory.states[first.dialogue_id]
    recognizer.answer([second], write=False)
    assert recognizer.memory.states[first.dialogue_id].equals(before)
    recognizer.without_memory().answer([second])
    assert recognizer.memory.states[first.dialogue_id].equals(before)


@pytest.mark.parametrize("labels", [EMOTIONS[:3], EMOTIONS[::-1], [*EMOTIONS[:3], "calm"]])
def test_other_labels_are_refused(labels):
    with pytest.raises(LabelError, match="keeps the host's answers"):
        recognizer_of(make_adapter(), labels=labels)


def test_vllm_refuses_it_at_the_start():
    with pytest.raises(ConfigError, match="keeps answers"):
        servable(make_adapter())
