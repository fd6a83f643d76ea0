"""The worker's memory, driven by scripts of steps, equals one utterance after the other."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mal_adapter import MemoryAdapter, MemoryConfig, MemoryState
from mal_adapter.errors import SessionConflictError, StoreError
from mal_adapter.stores import InMemoryStore
from mal_adapter.stores.states import SessionStates
from mal_adapter.vllm.sessions import StepSessions
from tests.vllm.fakes import FakeEngine, MultiModalFeatureSpec, PlaceholderRange, Request, SamplingParams

WIDTH = 8


@pytest.fixture(scope="module")
def adapter() -> MemoryAdapter:
    torch.manual_seed(0)
    adapter = MemoryAdapter(MemoryConfig(hidden_size=WIDTH, memory_dim=8, num_heads=2, step_bias=0.0)).double().eval()
    torch.nn.init.normal_(adapter.readout_out.weight)
    return adapter.requires_grad_(False)


def engine_of(adapter: MemoryAdapter, store: Any = None, *, v2: bool = False) -> FakeEngine:
    states = SessionStates(InMemoryStore() if store is None else store, adapter.check_state)
    return FakeEngine(adapter, StepSessions(states, adapter.check_state), v2=v2)


def request(name: str, session: str | None, audio: tuple[int, ...] = (3,), **extra: Any) -> Request:
    """A request with clips of these lengths, each behind one token of text, and two more tokens at the end."""
    features, offset = [], 0
    for length in audio:
        features.append(MultiModalFeatureSpec("audio", PlaceholderRange(offset + 1, length)))
        offset += 1 + length
    params = SamplingParams(({} if session is None else {"session_id": session}) | extra or None)
    generator = torch.Generator().manual_seed(hash(name) % 2**32)
    hidden = torch.randn(offset + 2 + 20, WIDTH, generator=generator, dtype=torch.float64)
    return Request(name, params, features, hidden)


def prompt_length(r: Request) -> int:
    return len(r.hidden) - 20


def audio_of(r: Request) -> Tensor:
    return torch.cat(
        [torch.arange(f.mm_position.offset, f.mm_position.offset + f.mm_position.length) for f in r.features]
    )


class Reference:
    """One utterance after the other, with the adapter's own read and write."""

    def __init__(self, adapter: MemoryAdapter) -> None:
        self.adapter = adapter
        self.states: dict[str, MemoryState] = {}

    def answer(self, r: Request, tokens: int) -> Tensor:
        hidden = r.hidden[:tokens].clone()
        session = (r.params.extra_args or {}).get("session_id")
        if session is None or not r.features:
            return hidden
        state = self.states.get(session) or self.adapter.initial_state(1)
        heard = hidden[audio_of(r)][None]
        heard = heard + self.adapter.read(state, heard)
        self.states[session] = self.adapter.write(state, heard)
        hidden[audio_of(r)] = heard[0]
        return hidden


def run(engine: FakeEngine, *requests: Request) -> dict[str, Tensor]:
    """The whole prompts of these requests in one step."""
    named = {r.req_id: r for r in requests}
    return engine.step({name: prompt_length(r) for name, r in named.items()}, named, list(reversed(named)))


@dataclasses.dataclass
class Live:
    request: Request
    before: Tensor | None = None  # what the layers above saw of its prompt


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_schedule_equals_one_utterance_after_the_other(adapter: MemoryAdapter, data: st.DataObject):
    """Arrivals, batches of prefills and decodes in any order, preemption, ends and aborts."""
    engine, reference = engine_of(adapter, v2=data.draw(st.booleans(), "v2")), Reference(adapter)
    live: dict[str, Live] = {}
    arrived = prefills = utterances = recomputed = 0
    for _ in range(data.draw(st.integers(1, 8), "steps")):
        for name in data.draw(st.lists(st.sampled_from(sorted(live)), unique=True), "leaving") if live else ():
            if data.draw(st.booleans(), "ends"):
                engine.finish(live.pop(name).request)
            elif live[name].request.computed:
                engine.preempt(live[name].request)
        for _ in range(data.draw(st.integers(0, 4), "arriving")):
            session = data.draw(st.sampled_from(["a", "b", "c", None]))
            audio = tuple(data.draw(st.lists(st.integers(1, 70), max_size=2)))
            live[f"r{arrived}"] = Live(request(f"r{arrived}", session, audio))
            arrived += 1
        # first come, first served: whoever has waited longer is computed no later
        waiting = [n for n, e in live.items() if not e.request.computed]
        held_back = waiting[data.draw(st.integers(0, len(waiting)), "admitted") :]
        chunks = {
            n: 1 if e.request.computed else prompt_length(e.request) for n, e in live.items() if n not in held_back
        }
        if not chunks:
            continue
        seen = engine.step(chunks, {n: live[n].request for n in chunks}, data.draw(st.permutations(sorted(chunks))))
        for name in chunks:  # in the order of arrival
            entry, r = live[name], live[name].request
            if chunks[name] == 1 and entry.before is not None and r.computed > prompt_length(r):
                assert torch.equal(seen[name], r.hidden[r.computed - 1 : r.computed])  # a decode has no audio
                continue
            is_utterance = bool(r.features) and r.params.extra_args is not None
            if entry.before is None:
                entry.before = reference.answer(r, prompt_length(r))
                utterances += is_utterance
            else:
                recomputed += is_utterance
            prefills += is_utterance
            torch.testing.assert_close(seen[name], entry.before, rtol=0, atol=1e-12)
    counters = engine.memory.counters
    assert (counters.reads, counters.writes, counters.recomputed) == (prefills, utterances, recomputed)
    assert counters.errors == counters.split == counters.conflicts == 0
    states = engine.memory.sessions.states
    assert sorted(states) == sorted(reference.states)
    for session, state in reference.states.items():
        for got, expected in zip(states[session].weights, state.weights, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    # it is told of what has ended with the next step, which may not have come
    assert engine.memory.requests <= len(live.keys() | engine.finished)


def test_a_control_without_a_past_counts_utterances_and_reads_the_same_each_time():
    torch.manual_seed(0)
    config = MemoryConfig(hidden_size=WIDTH, memory_dim=8, num_heads=2, update="none")
    control = MemoryAdapter(config).double().eval().requires_grad_(False)
    for parameter in (control.readout_out.weight, *control.initial):
        torch.nn.init.normal_(parameter)
    engine, reference = engine_of(control), Reference(control)
    requests = [request(name, "call", (4,), turn=turn) for turn, name in enumerate("abc")]
    for r in requests:
        found = run(engine, r)[r.req_id]
        assert torch.allclose(found, reference.answer(r, prompt_length(r)), atol=1e-12)
        assert torch.allclose(found, Reference(control).answer(r, prompt_length(r)), atol=1e-12)
        engine.finish(r)
    counted = reference.states["call"]
    assert counted.utterances.item() == 3
    assert not any(layer.any() for layer in counted.weights)


def test_tokens_without_audio_keep_their_bits(adapter: MemoryAdapter):
    engine = engine_of(adapter)
    r, other = request("r", "a", (3,)), request("other", None, (4,))
    seen = run(engine, r, other)
    text = [i for i in range(prompt_length(r)) if i not in audio_of(r)]
    half = 0.25 * r.hidden
    assert torch.equal(seen["r"][text], ((r.hidden - half) + half)[: prompt_length(r)][text])
    assert not torch.equal(seen["r"], r.hidden[: prompt_length(r)])
    assert torch.allclose(seen["other"], other.hidden[: prompt_length(other)])


def test_an_utterance_split_over_steps_has_no_memory_and_is_not_written(adapter: MemoryAdapter):
    engine, r = engine_of(adapter), request("r", "a", (5,))
    for chunk in (3, 5):
        seen = engine.step({"r": chunk}, {"r": r}, ["r"])["r"]
        assert torch.allclose(seen, r.hidden[r.computed - chunk : r.computed])
    assert engine.memory.counters.split == 1
    assert "a" not in engine.memory.sessions.states
    assert engine.memory.outcomes["a"].reason.startswith("2 of 5 audio tokens")
    assert not engine.memory.outcomes["a"].read


def test_text_before_the_audio_may_be_a_step_of_its_own(adapter: MemoryAdapter):
    engine, r = engine_of(adapter), request("r", "a", (5,))
    engine.step({"r": 1}, {"r": r}, ["r"])
    engine.step({"r": prompt_length(r) - 1}, {"r": r}, ["r"])
    assert engine.memory.counters.writes == 1
    assert engine.memory.counters.split == 0


# turn numbers --------------------------------------------------------------------------------------------------------


def test_a_turn_that_is_sent_again_reads_the_same_and_is_not_written_again(adapter: MemoryAdapter):
    engine = engine_of(adapter)
    run(engine, request("r0", "a", turn=0))
    first = run(engine, request("r1", "a", (6,), turn=1))["r1"]
    before = engine.memory.sessions.states["a"]
    again = request("r1", "a", (6,), turn=1)
    again.req_id = "again"
    assert torch.allclose(run(engine, again)["again"], first, rtol=0, atol=1e-12)
    assert engine.memory.sessions.states["a"] is before
    assert (engine.memory.counters.writes, engine.memory.counters.repeated) == (2, 1)
    run(engine, request("r2", "a", turn=2))
    assert engine.memory.counters.writes == 3


def test_a_turn_sent_twice_in_one_step_is_written_once(adapter: MemoryAdapter):
    engine = engine_of(adapter)
    run(engine, request("r", "a", turn=0), request("twin", "a", turn=0))
    assert int(engine.memory.sessions.states["a"].utterances) == 1
    assert engine.memory.counters.repeated == 1


@pytest.mark.parametrize("turn", [1, 5])
def test_a_turn_that_is_not_due_is_not_written(adapter: MemoryAdapter, turn: int):
    engine = engine_of(adapter)
    run(engine, request("r", "a", turn=turn))
    assert engine.memory.counters.conflicts == 1
    assert "a" not in engine.memory.sessions.states
    assert engine.memory.outcomes["a"].reason == f"turn 0 is due, not {turn}"


def test_a_turn_is_due_after_an_aborted_request_only_if_that_was_not_written(adapter: MemoryAdapter):
    engine = engine_of(adapter)
    aborted = request("aborted", "a", turn=0)
    run(engine, aborted)
    engine.finish(aborted)
    run(engine, request("retry", "a", turn=0))
    assert int(engine.memory.sessions.states["a"].utterances) == 1
    assert engine.memory.requests == 1


# what goes wrong -----------------------------------------------------------------------------------------------------


class Broken(InMemoryStore):
    """A store that fails as told."""

    get_error: Exception | None = None
    put_error: Exception | None = None
    gets = puts = 0

    def get(self, session_id: str) -> Any:
        self.gets += 1
        if self.get_error is not None:
            raise self.get_error
        return super().get(session_id)

    def put(self, session_id: str, state: MemoryState, version: str | None = None) -> str:
        self.puts += threading.current_thread() is threading.main_thread()  # the backlog has a thread of its own
        if self.put_error is not None:
            raise self.put_error
        return super().put(session_id, state, version)


def test_a_store_that_does_not_answer_costs_the_memory_only_and_is_asked_ever_more_seldom(adapter: MemoryAdapter):
    store = Broken()
    engine = engine_of(adapter, store)
    now = 100.0
    engine.memory.sessions._clock = lambda: now
    store.get_error = StoreError("no connection")
    asked = []
    for second in range(100):
        now = 100.0 + second
        before = store.gets
        requests = [request(f"r{second}-{i}", f"session-{i}") for i in range(3)]
        seen = run(engine, *requests)
        for r in requests:
            assert torch.allclose(seen[r.req_id], r.hidden[: prompt_length(r)])
            engine.finish(r)
        asked += [second] * (store.gets - before)
    assert asked == [0, 1, 3, 7, 15, 31, 61, 91]
    assert engine.memory.counters.unavailable == 300
    store.get_error = None
    now += 30
    run(engine, request("later", "session-0"), request("other", "session-1"))
    assert engine.memory.counters.writes == 2
    store.get_error = StoreError("no connection")
    run(engine, request("r0", "session-0"))
    now += 1.1  # the pause is short again
    store.get_error = None
    run(engine, request("r1", "session-0"))
    assert engine.memory.counters.writes == 3


def test_a_store_that_can_not_save_is_not_asked_for_each_session(adapter: MemoryAdapter):
    store = Broken()
    engine = engine_of(adapter, store)
    engine.memory.sessions._clock = lambda: 100.0
    store.put_error = StoreError("disk full")
    run(engine, *(request(f"r{i}", f"session-{i}") for i in range(5)))
    assert store.puts == 1
    assert engine.memory.counters.unsaved == engine.memory.counters.writes == 5
    states = engine.memory.sessions.states
    assert len(states.unsaved) == 5
    run(engine, request("next", "session-3"))  # continues from the state in this process
    assert int(states["session-3"].utterances) == 2
    store.put_error = None
    states.flush()
    assert [int(store.get(f"session-{i}").state.utterances) for i in range(5)] == [1, 1, 1, 2, 1]


def test_what_a_store_can_not_save_is_kept_and_continued(adapter: MemoryAdapter):
    store = Broken()
    engine = engine_of(adapter, store)
    store.put_error = StoreError("disk full")
    run(engine, request("r0", "a"))
    store.get_error = StoreError("no connection")
    run(engine, request("r1", "a"))
    states = engine.memory.sessions.states
    assert engine.memory.counters.unsaved == 2
    assert engine.memory.counters.writes == 2
    assert states.unsaved == ["a"]
    assert int(states["a"].utterances) == 2
    store.get_error = store.put_error = None
    states.flush()
    assert int(store.get("a").state.utterances) == 2


def test_what_the_process_has_no_room_for_is_not_written(adapter: MemoryAdapter):
    store = Broken()
    engine = engine_of(adapter, store)
    engine.memory.sessions.states.backlog.max_sessions = 1
    store.put_error = StoreError("disk full")
    run(engine, request("r0", "a"), request("r1", "b"))
    assert (engine.memory.counters.unsaved, engine.memory.counters.writes) == (2, 1)
    assert [engine.memory.outcomes[session].written for session in "ab"] == [True, False]
    assert "no room" in engine.memory.outcomes["b"].reason
    assert engine.memory.sessions.states.unsaved == ["a"]


def test_a_dialogue_that_another_engine_continued_keeps_the_others_state(adapter: MemoryAdapter):
    store = Broken()
    engine = engine_of(adapter, store)
    store.put_error = SessionConflictError("another writer")
    run(engine, request("r0", "a"))
    assert (engine.memory.counters.conflicts, engine.memory.counters.writes) == (1, 0)
    assert not engine.memory.outcomes["a"].written
    store.put_error = None
    run(engine, request("r1", "a"))
    assert engine.memory.counters.writes == 1


def test_a_state_of_another_adapter_costs_only_its_own_session(adapter: MemoryAdapter):
    engine = engine_of(adapter)
    other = MemoryAdapter(MemoryConfig(hidden_size=WIDTH, memory_dim=4, num_heads=1)).double().eval()
    engine.memory.sessions.states.store.put("foreign", other.initial_state())
    run(engine, request("r0", "foreign"), request("r1", "own"))
    assert engine.memory.counters.unavailable == 1
    assert engine.memory.counters.writes == 1


def test_an_error_in_the_layer_is_counted_and_the_engine_goes_on(
    adapter: MemoryAdapter, monkeypatch: pytest.MonkeyPatch
):
    engine, r = engine_of(adapter), request("r", "a")
    with monkeypatch.context() as patch:
        patch.setattr(engine.memory.adapter, "write_tokens", lambda *a, **k: 1 / 0)
        seen = run(engine, r)["r"]
    assert torch.allclose(seen, r.hidden[: prompt_length(r)])
    assert engine.memory.counters.errors == 1
    assert "ZeroDivisionError" in engine.memory.outcomes["a"].reason
    run(engine, request("next", "a"))
    assert engine.memory.counters.writes == 1


def test_a_batch_of_unknown_requests_is_counted_and_the_engine_goes_on(adapter: MemoryAdapter):
    engine, r = engine_of(adapter), request("r", "a")
    engine.memory._order = lambda: ["somebody else"]
    assert torch.allclose(run(engine, r)["r"], r.hidden[: prompt_length(r)])
    assert engine.memory.counters.errors == 1
    engine.memory._order = lambda: engine.order
    run(engine, request("next", "a"))
    assert engine.memory.counters.writes == 1


@pytest.mark.parametrize("damaged", [None, 3, object()])
def test_a_step_that_is_not_understood_changes_nothing(adapter: MemoryAdapter, damaged: object):
    engine = engine_of(adapter)
    engine.memory.begin(damaged)
    engine.memory.change(torch.zeros(3, WIDTH), None)
    engine.memory.end(succeeded=True)
    run(engine, request("next", "a"))
    assert engine.memory.counters.writes == 1


def test_a_step_that_fails_saves_nothing(adapter: MemoryAdapter):
    engine, r = engine_of(adapter), request("r", "a")
    end = engine.memory.end
    engine.memory.end = lambda *, succeeded: end(succeeded=False)  # type: ignore[method-assign]
    run(engine, r)
    assert "a" not in engine.memory.sessions.states
    assert engine.memory.counters.writes == 0


def test_audio_that_is_not_a_number_is_not_written(adapter: MemoryAdapter):
    engine, r = engine_of(adapter), request("r", "a")
    r.hidden[2] = float("nan")
    run(engine, r, request("fine", "b"))
    assert (engine.memory.counters.skipped, engine.memory.counters.writes) == (1, 1)
    states = engine.memory.sessions.states
    assert all(bool(torch.isfinite(w).all()) for w in states["a"].weights)
    run(engine, request("next", "a", turn=1))  # the skipped one counts as a turn
    assert engine.memory.counters.writes == 2


def test_bad_parameters_behind_admission_have_no_memory(adapter: MemoryAdapter):
    engine = engine_of(adapter)
    r = request("r", "a")
    r.params.n = 2
    assert torch.allclose(run(engine, r)["r"], r.hidden[: prompt_length(r)])
    assert engine.memory.counters.refused == 1


def test_outside_a_step_nothing_happens(adapter: MemoryAdapter):
    engine = engine_of(adapter)
    hidden = torch.ones(5, WIDTH)
    engine.memory.change(hidden, None)
    assert torch.equal(hidden, torch.ones(5, WIDTH))


def test_ranks_read_what_rank_0_found(adapter: MemoryAdapter):
    first, wire = engine_of(adapter), []
    first.memory.sessions._share = lambda value: wire.append(value) or value
    second = FakeEngine(adapter, StepSessions(None, adapter.check_state, lambda value: wire.pop(0)))
    for i in range(3):
        a, b = request(f"r{i}", "a", turn=i), request(f"r{i}", "a", turn=i)
        assert torch.equal(run(first, a)[f"r{i}"], run(second, b)[f"r{i}"])
    assert int(first.memory.sessions.states["a"].utterances) == 3
