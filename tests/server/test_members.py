"""The embedded server with an adapter of several members: one session has one state, which is forked, sent and kept."""

import pytest
import torch
from fastapi.testclient import TestClient

from mal_adapter import MemoryAdapter, MemoryEnsemble, MemoryState
from mal_adapter.demo import ADAPTER_FOLDER, EMOTIONS, HOST_FOLDER, PROMPT
from mal_adapter.errors import SessionConflictError, StoreError
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
from mal_adapter.server import Limits, make_app
from mal_adapter.stores import FolderStore, InMemoryStore

pytestmark = pytest.mark.filterwarnings("ignore::mal_adapter.errors.UnsavedSessionWarning")


class Faulty(InMemoryStore):
    away = False

    def put(self, session_id: str, state: MemoryState, version: str | None = None) -> str:
        if self.away:
            raise StoreError("can't write sessions")
        return super().put(session_id, state, version)


def make_recognizer(store=None) -> EmotionRecognizer:
    torch.manual_seed(3)
    members = [MemoryAdapter.from_pretrained(ADAPTER_FOLDER) for _ in range(2)]
    with torch.no_grad():
        for member in members:
            for parameter in member.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    host = load_host(str(HOST_FOLDER))
    return EmotionRecognizer.from_pretrained(MemoryEnsemble(members), host, labels=EMOTIONS, prompt=PROMPT, store=store)


def send(client, session, utterance):
    reply = client.post(f"/sessions/{session}/utterances", content=utterance.audio.read_bytes())
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_sessions_are_continued_forked_downloaded_and_uploaded(spoken):
    recognizer = make_recognizer()
    turns = spoken[0].utterances
    expected = [result.probabilities for result in recognizer.recognize(spoken[0])]
    with TestClient(make_app(recognizer, recognizer.memory, Limits())) as client:
        for turn, probabilities in zip(turns[:3], expected, strict=False):
            assert send(client, "call", turn)["probabilities"] == pytest.approx(probabilities, abs=1e-5)
        assert client.post("/sessions/call/fork", json={"to": "what-if"}).json()["utterances"] == 3
        state = client.get("/states/call").content
        assert client.put("/states/again", content=state).status_code == 201
        for session in ("call", "what-if", "again"):
            assert send(client, session, turns[3])["probabilities"] == pytest.approx(expected[3], abs=1e-5)
        one = recognizer.memory.adapter.members[0].initial_state().to_bytes()
        refused = client.put("/states/other", content=one)
        assert refused.status_code == 422
        assert "another adapter" in refused.text


def test_an_outage_keeps_the_state_of_all_members(spoken):
    store = Faulty()
    recognizer = make_recognizer(store)
    first, second = spoken[0].utterances[:2]
    recognizer.answer([first])
    store.away = True
    assert recognizer.answer([second])
    [unsaved] = recognizer.memory.states.unsaved
    store.away = False
    recognizer.memory.states.flush()
    state = store.get(unsaved).state
    assert (state.utterances.item(), len(state.weights)) == (2, 2 * len(recognizer.memory.adapter.initial))


def test_a_conflict_commits_no_member(spoken, tmp_path):
    here, there = (make_recognizer(FolderStore(tmp_path)) for _ in range(2))
    first, second = spoken[0].utterances[:2]
    here.answer([first], session_ids=["call"])
    inputs = here.prepare([second]).inputs
    with torch.no_grad(), here.memory.session("call"):
        there.answer([second], session_ids=["call"])
        kept = there.memory.states["call"]
        with pytest.raises(SessionConflictError):
            here.log_probs(inputs)
    assert here.memory.states["call"].equals(kept)
