"""Sessions over a store: a dialogue goes on wherever its state lies, and no outage or second writer loses an update."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mal_adapter import AttachedMemory, MemoryState, attach_memory
from mal_adapter.errors import (
    SessionConflictError,
    SessionError,
    StateMismatchError,
    StoreError,
    UnsavedSessionWarning,
)
from mal_adapter.stores import FolderStore, InMemoryStore, RedisStore, SessionStore, unsaved
from tests.hosts.builders import HOSTS
from tests.hosts.probes import random_adapter, same_bits
from tests.stores.servers import Proxy, RedisServer

HOST = HOSTS["qwen2_audio"]
Stores = Callable[..., SessionStore]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return HOST.build(num_layers=3)


@pytest.fixture
def store(make_store: Stores) -> SessionStore:
    return make_store()


def attach(model: PreTrainedModel, store: SessionStore) -> AttachedMemory:
    return attach_memory(model, layer_idx=1, adapter=random_adapter(), store=store)


def opened_anew(store: SessionStore) -> SessionStore:
    """As another process would; what lives in a process has no other."""
    if isinstance(store, FolderStore):
        return FolderStore(store.folder)
    return RedisStore(store._client, store.prefix) if isinstance(store, RedisStore) else store


@torch.no_grad()
def speak(model: PreTrainedModel, turn: int) -> Tensor:
    return model(**HOST.collate(model, [HOST.prompt([4], seed=turn)])[0]).logits


def uninterrupted(model: PreTrainedModel, turns: range) -> tuple[list[Tensor], MemoryState]:
    with attach(model, InMemoryStore()) as memory:
        with memory.session("call"):
            answers = [speak(model, turn) for turn in turns]
        return answers, memory.states["call"]


# ------------------------------------------------------------------------------------------------------------ resume


def test_a_dialogue_resumed_at_every_utterance_keeps_every_bit(model: PreTrainedModel, store: SessionStore):
    expected, last = uninterrupted(model, range(5))
    for turn, answer in enumerate(expected):
        with attach(model, opened_anew(store)) as memory, memory.session("call/42"):
            assert same_bits(speak(model, turn), answer)
    stored = store.get("call/42")
    assert stored is not None
    assert stored.state.equals(last)


def test_states_are_listed_forked_exported_imported_and_dropped(
    model: PreTrainedModel, store: SessionStore, tmp_path: Path
):
    with attach(model, store) as memory:
        for name in ("a", "b"):
            with memory.session(name):
                speak(model, ord(name))
        memory.states["fork"] = memory.states["a"]
        assert sorted(memory.states) == ["a", "b", "fork"]
        assert memory.states["fork"].equals(memory.states["a"])
        memory.states["a"].save(tmp_path / "a.safetensors")
        del memory.states["a"]
        assert "a" not in memory.states
        memory.states["a"] = MemoryState.load(tmp_path / "a.safetensors")
        with memory.session("a"):
            answer = speak(model, 9)
        with memory.session("fork"):
            assert same_bits(speak(model, 9), answer)
        memory.states["fork"] = memory.states["b"]  # over what is there
        assert memory.states["fork"].equals(memory.states["b"])
        memory.states.clear()
        assert list(memory.states) == list(store) == []
        with pytest.raises(KeyError):
            memory.states["a"]
        with pytest.raises(KeyError):
            del memory.states["a"]
        with pytest.raises(SessionError, match=r"not a \w+Path; MemoryState\.load"):
            memory.states["a"] = tmp_path / "a.safetensors"  # a file's name is no state


def test_the_state_of_another_adapter_is_refused_when_a_session_opens(model: PreTrainedModel, store: SessionStore):
    with attach(model, store) as memory, memory.session("call"):
        speak(model, 0)
    kept = store.get("call")
    other = attach_memory(model, layer_idx=1, adapter=random_adapter(seed=1), store=store)
    with other, pytest.raises(StateMismatchError, match="load the adapter it belongs to"), other.session("call"):
        pass
    assert kept is not None
    assert store.get("call").state.equals(kept.state)


def test_an_open_session_goes_on_though_its_state_is_evicted(model: PreTrainedModel):
    expected, last = uninterrupted(model, range(3))
    with attach(model, InMemoryStore(max_sessions=1)) as memory:
        other = memory.adapter.initial_state()
        with memory.session("call"):
            for turn, answer in enumerate(expected):
                memory.states[f"other {turn}"] = other
                assert same_bits(speak(model, turn), answer)
        assert memory.states["call"].equals(last)
        assert list(memory.states) == ["call"]


def test_a_store_is_told_by_its_place(model: PreTrainedModel, tmp_path: Path):
    for turn in range(2):
        with attach_memory(model, layer_idx=1, adapter=random_adapter(), store=tmp_path) as memory:
            with memory.session("call"):
                speak(model, turn)
            assert memory.states["call"].utterances.tolist() == [turn + 1]
    assert MemoryState.load(tmp_path / "call.safetensors").utterances.tolist() == [2]


# --------------------------------------------------------------------------------------------------------- conflicts


def test_of_two_that_continue_a_dialogue_one_is_told_and_no_update_is_lost(model: PreTrainedModel, store: SessionStore):
    expected, last = uninterrupted(model, range(3))
    one, other = HOST.build(num_layers=3), HOST.build(num_layers=3)
    first, second = attach(one, store), attach(other, opened_anew(store))
    with first.session("call"):
        speak(one, 0)
        with _fresh_thread_of(second, "call") as (say, close):
            speak(one, 1)
            with pytest.raises(SessionConflictError, match="call") as conflict:
                say(other, 7)
            close()
    assert conflict.value.state.utterances.tolist() == [2]  # nothing is lost: it can be kept under another id
    second.states["theirs"] = conflict.value.state
    with second.session("call"):  # told so, it repeats its utterance after the other's
        assert same_bits(speak(other, 2), expected[2])
    assert store.get("call").state.equals(last)


class _fresh_thread_of:  # noqa: N801 - reads as a verb
    """A session of its own in a thread of its own, as another process has."""

    def __init__(self, memory: AttachedMemory, name: str) -> None:
        self.memory, self.name = memory, name
        self._orders: list[tuple[PreTrainedModel, int] | None] = []
        self._given, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> tuple[Callable[[PreTrainedModel, int], None], Callable[[], None]]:
        self._thread.start()
        self._done.acquire()
        return self._say, self._close

    def __exit__(self, *_: object) -> None:
        self._close()

    def _run(self) -> None:
        with self.memory.session(self.name):
            self._done.release()
            while True:
                self._given.acquire()
                order = self._orders.pop()
                if order is None:
                    return
                try:
                    speak(*order)
                except Exception as error:
                    self._error = error
                self._done.release()

    def _say(self, model: PreTrainedModel, turn: int) -> None:
        self._orders.append((model, turn))
        self._given.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def _close(self) -> None:
        if self._thread.is_alive():
            self._orders.append(None)
            self._given.release()
            self._thread.join()


# ----------------------------------------------------------------------------------------------------------- outages


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is saved again by itself; that is tests/test_unsaved.py's."""
    monkeypatch.setattr(unsaved, "FIRST_S", 3600.0)
    monkeypatch.setattr(unsaved, "LONGEST_S", 3600.0)


@pytest.fixture
def own_server(short_path: Path) -> Iterator[RedisServer]:
    own = RedisServer(short_path, "--appendonly", "yes", "--appendfsync", "always", "--save", "").start()
    yield own
    own.kill()


def _speak_while(leave: Callable[[], object], model: PreTrainedModel, memory: AttachedMemory) -> None:
    with memory.session("call"):
        speak(model, 0)
        leave()
        with pytest.warns(UnsavedSessionWarning):
            speak(model, 1)


@pytest.mark.usefixtures("by_hand")
def test_redis_gone_amid_a_session_and_back_within_it(model: PreTrainedModel, own_server: RedisServer):
    expected, last = uninterrupted(model, range(4))
    store = RedisStore(own_server.url)
    with attach(model, store) as memory, memory.session("call"):
        assert same_bits(speak(model, 0), expected[0])
        own_server.kill()
        for turn in (1, 2):
            with pytest.warns(UnsavedSessionWarning, match="'call' kept in this process only"):
                assert same_bits(speak(model, turn), expected[turn])
        assert memory.states.unsaved == ["call"]
        own_server.start()
        assert same_bits(speak(model, 3), expected[3])
        assert memory.states.unsaved == []
    assert store.get("call").state.equals(last)


@pytest.mark.usefixtures("by_hand")
def test_redis_gone_until_after_the_session(model: PreTrainedModel, own_server: RedisServer):
    expected, last = uninterrupted(model, range(3))
    store = RedisStore(own_server.url)
    with attach(model, store) as memory:
        with pytest.raises(StoreError, match="check that Redis runs there"):
            _speak_while(own_server.kill, model, memory)
        with pytest.raises(StoreError):
            memory.states.flush()
        with pytest.raises(StoreError), memory.session("new"):  # whether it is new, only Redis knows
            pass
        with pytest.raises(StoreError):
            del memory.states["call"]  # and what this process has is not lost by the failure
        with pytest.raises(StoreError), memory.session("call"), pytest.warns(UnsavedSessionWarning):
            assert same_bits(speak(model, 2), expected[2])  # what this process has goes on
        assert memory.states["call"].equals(last)
        own_server.start()
        memory.states.flush()
        assert memory.states.unsaved == []
    assert store.get("call").state.equals(last)


@pytest.mark.usefixtures("by_hand")
def test_what_only_this_process_has_is_listed_and_can_be_set_anew(model: PreTrainedModel, tmp_path: Path):
    store = FolderStore(tmp_path / "sessions")
    with attach(model, store) as memory:
        with pytest.raises(StoreError):
            _speak_while(lambda: (tmp_path / "sessions").rename(tmp_path / "gone"), model, memory)
        (tmp_path / "sessions").mkdir()
        assert (list(store), list(memory.states), memory.states.unsaved) == ([], ["call"], ["call"])
        memory.states["call"] = memory.adapter.initial_state()
        memory.states.flush()
        assert memory.states["call"].utterances.tolist() == [0]
        assert memory.states.unsaved == []


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize("flush", [False, True])  # beside the open block, which is no conflict with it
def test_a_folder_gone_amid_a_session_and_back(model: PreTrainedModel, tmp_path: Path, flush: bool):
    expected, last = uninterrupted(model, range(3))
    store = FolderStore(tmp_path / "sessions")
    with attach(model, store) as memory, memory.session("call"):
        assert same_bits(speak(model, 0), expected[0])
        (tmp_path / "sessions").rename(tmp_path / "unmounted")
        with pytest.warns(UnsavedSessionWarning, match="the folder is gone"):
            assert same_bits(speak(model, 1), expected[1])
        (tmp_path / "unmounted").rename(tmp_path / "sessions")
        if flush:
            memory.states.flush()
        assert same_bits(speak(model, 2), expected[2])
    assert store.get("call").state.equals(last)


def test_damaged_sessions_can_be_forgotten(model: PreTrainedModel, tmp_path: Path):
    (tmp_path / "call.safetensors").write_text("no state")
    with attach(model, FolderStore(tmp_path)) as memory:
        memory.states.forget(["call", "never heard of"])
        assert list(memory.states) == []


@pytest.mark.usefixtures("by_hand")
def test_a_conflict_after_an_outage_names_the_loser(model: PreTrainedModel, own_server: RedisServer):
    store = RedisStore(own_server.url)
    with attach(model, store) as memory:
        with pytest.raises(StoreError):
            _speak_while(own_server.kill, model, memory)
        own_server.start()
        theirs = store.put("call", memory.adapter.initial_state(), store.get("call").version)
        with pytest.raises(SessionConflictError) as conflict:
            memory.states.flush()
        assert store.get("call").version == theirs
        assert conflict.value.state.utterances.tolist() == [2]
        memory.states.flush()  # the others


@pytest.mark.usefixtures("by_hand")
def test_a_save_whose_answer_was_lost_is_no_conflict_with_oneself(model: PreTrainedModel, own_server: RedisServer):
    expected, last = uninterrupted(model, range(5))
    proxy = Proxy(own_server.port)
    direct = RedisStore(own_server.url)
    through_proxy = RedisStore(own_server.url.replace(str(own_server.port), str(proxy.own_port)))
    with attach(model, through_proxy) as memory, memory.session("call"):
        speak(model, 0)
        for turn in (1, 2):
            proxy.swallow = True
            with pytest.warns(UnsavedSessionWarning):
                speak(model, turn)
        assert direct.get("call").state.utterances.tolist() == [2]  # it did arrive
        own_server.kill()
        with pytest.warns(UnsavedSessionWarning):
            speak(model, 3)
        own_server.start()
        proxy.swallow = False
        assert same_bits(speak(model, 4), expected[4])
    proxy.close()
    assert direct.get("call").state.equals(last)
