"""A batch's answers are those of each utterance alone, and the failure of one is the failure of that one only."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from mal_adapter import MemoryAdapter, MemoryConfig, MemoryState
from mal_adapter.errors import HostError, SessionConflictError, SessionError, StateMismatchError, StoreError
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.server.answers import Answer, Answerer, Turn
from mal_adapter.server.refusals import Refusal
from mal_adapter.stores import InMemoryStore
from mal_adapter.stores.base import Stored

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::mal_adapter.errors.UnsavedSessionWarning")]

FINE = ["fine-0", "fine-1", "fine-2"]


class Faulty(InMemoryStore):
    """Fails for the session whose id is the kind of the fault."""

    def get(self, session_id: str) -> Stored | None:
        if session_id == "unreadable":
            raise StoreError("can't read")
        return super().get(session_id)

    def put(self, session_id: str, state: MemoryState, version: str | None = None) -> str:
        if session_id == "unsaved":
            raise StoreError("can't write")
        if session_id == "conflict":
            raise SessionConflictError("another writer")
        return super().put(session_id, state, version)


def alone(recognizer: Any, spoken: list[Any], number: int) -> list[dict[str, float]]:
    """The probabilities of a dialogue's first two utterances, one by one."""
    results = [recognizer.answer([u], session_ids=[f"alone-{number}"])[0] for u in spoken[number].utterances[:2]]
    return [result.probabilities for result in results]


FAULTS: dict[str, type[Exception] | None] = {
    "damaged": Refusal,
    "unreadable": StoreError,
    "conflict": SessionConflictError,
    "other-adapter": StateMismatchError,
    "poisoned": HostError,
    "open": SessionError,
    "unsaved": None,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_failure_in_a_batch_is_not_one_of_the_others(fault, recognizer_on, spoken, tmp_path: Path):
    recognizer = recognizer_on(Faulty())
    memory = recognizer.memory
    expected = [alone(recognizer, spoken, number) for number in range(3)]
    answer = Answerer(recognizer, memory)
    first = answer([Turn(name, spoken[n].utterances[0].audio) for n, name in enumerate(FINE)])
    path = spoken[3].utterances[0].audio
    if fault == "damaged":
        (path := tmp_path / "damaged").write_bytes(spoken[3].utterances[0].audio.read_bytes()[:9000])
    if fault == "other-adapter":
        config = MemoryConfig(hidden_size=memory.adapter.config.hidden_size, memory_dim=8)
        memory.states.store.put(fault, MemoryAdapter(config).eval().initial_state())
    if fault == "poisoned":
        state = memory.adapter.initial_state().map(torch.clone)
        state.weights[0].fill_(float("nan"))
        memory.states.store.put(fault, state)
    before = memory.states.store.get(fault) if fault != "unreadable" else None
    turns = [Turn(name, spoken[n].utterances[1].audio) for n, name in enumerate(FINE)]
    turns.insert(1, Turn(fault, path))
    if fault == "open":
        with memory.states.opened([fault]):
            outcomes = answer(turns)
    else:
        outcomes = answer(turns)
    failed = outcomes.pop(1)
    kind = FAULTS[fault]
    if kind is None:
        assert isinstance(failed, Answer)
        assert not failed.saved
        assert memory.states.unsaved == ["unsaved"]
    else:
        assert isinstance(failed, kind)
        if fault != "unreadable":
            assert memory.states.store.get(fault) == before, "unchanged"
    for n, outcome in enumerate(outcomes):
        assert isinstance(outcome, Answer), outcome
        assert (outcome.utterance, outcome.saved) == (2, True)
        assert first[n].prediction.probabilities == pytest.approx(expected[n][0], abs=1e-5)
        assert outcome.prediction.probabilities == pytest.approx(expected[n][1], abs=1e-5)
        assert int(memory.states[FINE[n]].utterances) == 2
    with contextlib.suppress(StoreError), memory.states.opened(FINE), memory.states.opened([fault]):
        pass  # none of them was left open: that would be a SessionError


def test_a_forward_that_fails_for_several_is_tried_for_each(recognizer_on, spoken, monkeypatch):
    recognizer = recognizer_on()
    sizes = []
    usual = recognizer.answer_from

    def short_of_memory(utterances: list[Utterance], *rest: Any) -> Any:
        sizes.append(len(utterances))
        if len(utterances) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return usual(utterances, *rest)

    monkeypatch.setattr(recognizer, "answer_from", short_of_memory)
    turns = [Turn(name, spoken[n].utterances[0].audio) for n, name in enumerate(FINE)]
    outcomes = Answerer(recognizer, recognizer.memory)(turns)
    assert sizes == [3, 1, 1, 1]
    assert [outcome.utterance for outcome in outcomes] == [1, 1, 1]
    assert [int(recognizer.memory.states[name].utterances) for name in FINE] == [1, 1, 1]


def test_answer_from_reads_and_returns_states_and_saves_none(recognizer_on, spoken):
    recognizer = recognizer_on()
    utterances = [dialogue.utterances[0] for dialogue in spoken[:3]]
    first = recognizer.answer_from(utterances, [None, None, None])
    second = recognizer.answer_from([d.utterances[1] for d in spoken[:3]], [each.state for each in first])
    assert len(recognizer.memory.states) == 0
    for number, (one, two) in enumerate(zip(first, second, strict=True)):
        expected = alone(recognizer, spoken, number)
        assert one.result.probabilities == pytest.approx(expected[0], abs=1e-5)
        assert two.result.probabilities == pytest.approx(expected[1], abs=1e-5)
        kept = recognizer.memory.states[f"alone-{number}"]
        assert int(two.state.utterances) == 2
        for ours, theirs in zip(two.state.weights, kept.weights, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
