"""Pickled, deep-copied, or handed to another process: it works there, or an error says what to do instead."""

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mal_adapter import AttachedMemory, MemoryState, attach_memory
from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER
from mal_adapter.errors import CopyError, MalAdapterError
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
from mal_adapter.stores import FolderStore, InMemoryStore, RedisStore
from tests.stores.states import state_of

WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "old pickle": lambda thing: pickle.loads(pickle.dumps(thing, protocol=2)),
    "deepcopy": copy.deepcopy,
    "within a list": lambda thing: pickle.loads(pickle.dumps([thing]))[0],
}
way = pytest.mark.parametrize("through", WAYS.values(), ids=WAYS)


@pytest.fixture(scope="module")
def host() -> tuple[Any, Any]:
    return load_host(str(HOST_FOLDER))


@pytest.fixture(scope="module")
def memory(host: tuple[Any, Any]) -> AttachedMemory:
    return attach_memory(host[0], adapter=ADAPTER_FOLDER)


@pytest.fixture(scope="module")
def recognizer(host: tuple[Any, Any], memory: AttachedMemory) -> EmotionRecognizer:
    return EmotionRecognizer(*host, memory)


@way
def test_objects_of_one_process_say_what_to_send_instead(
    through: Callable[[Any], Any], recognizer: EmotionRecognizer, memory: AttachedMemory
):
    with memory.session("call") as session:
        bound: dict[str, tuple[Any, str]] = {
            "recogniser": (recognizer, r"EmotionRecognizer\.from_pretrained\(adapter, model\)"),
            "bare twin": (recognizer.without_memory(), r"EmotionRecognizer\.from_pretrained\(adapter, model\)"),
            "memory": (memory, r"call attach_memory\(model, adapter=…, store=…\) with memory\.adapter"),
            "states": (memory.states, r"a single state can: memory\.states\[id\]"),
            "session": (session, "open the session by its id there"),
            "store": (InMemoryStore(), "FolderStore or a Redis URL"),
        }
        for thing, expected in bound.values():
            with pytest.raises(CopyError, match=expected) as caught:
                through(thing)
            assert isinstance(caught.value, MalAdapterError)
            assert isinstance(caught.value, TypeError)  # as pickle's own error is
    assert session.ids == ("call",)


@way
def test_values_and_what_reaches_a_shared_place_can_be_copied(
    through: Callable[[Any], Any], tmp_path: Path, host: tuple[Any, Any], memory: AttachedMemory
):
    state = through(state_of(3))
    assert isinstance(state, MemoryState)
    assert state.equals(state_of(3))
    store = FolderStore(tmp_path, ttl_s=60)
    version = store.put("call/1", state_of(1))
    twin = through(store)
    assert (twin.get("call/1").version, twin.ttl_s) == (version, 60)
    far = through(RedisStore("redis://127.0.0.1:1/3", "mine:", 60))
    assert repr(far) == "RedisStore('redis://127.0.0.1:1/3', prefix='mine:', ttl_s=60)"
    memory.adapter.check_state(through(memory.adapter).initial_state())
    assert through(memory.host) == memory.host


@way
def test_a_password_gets_into_no_pickle(through: Callable[[Any], Any]):
    import redis

    for secret in ("redis://:s3cret@127.0.0.1", "redis://al1ce@127.0.0.1", "redis://127.0.0.1?password=s3cret"):
        with pytest.raises(CopyError, match="pass the URL to the other process") as caught:
            through(RedisStore(secret))
        assert "s3cret" not in str(caught.value)
    with pytest.raises(CopyError, match="make a store in the other process"):
        through(RedisStore(redis.Redis()))


class Sounds(Dataset[int]):
    """A data set that holds on to more than it needs."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return index


def put_one(store: FolderStore) -> None:
    store.put("from there", state_of(5))


def answer_there(host: Any, ids: torch.Tensor) -> list[float]:
    with torch.no_grad():
        return host(input_ids=ids).logits[0, -1, :4].tolist()


@pytest.mark.slow
def test_in_a_process_of_its_own(
    recognizer: EmotionRecognizer, memory: AttachedMemory, host: tuple[Any, Any], tmp_path: Path
):
    """By spawn, as on macOS and Windows; by the workers of a DataLoader; and by joblib's."""
    spawn = multiprocessing.get_context("spawn")
    with pytest.raises(CopyError, match="EmotionRecognizer"):
        spawn.Process(target=print, args=(recognizer,)).start()
    with pytest.raises(CopyError, match="EmotionRecognizer"):
        next(iter(DataLoader(Sounds(recognizer), num_workers=1, multiprocessing_context="spawn")))
    with pytest.raises(Exception, match="pickle") as caught:
        joblib.Parallel(n_jobs=2)(joblib.delayed(print)(each) for each in [recognizer] * 2)
    assert "EmotionRecognizer.from_pretrained(adapter, model)" in str(caught.value.__cause__)

    store = FolderStore(tmp_path)
    model, _ = host
    ids = torch.arange(1, 9)[None]
    with memory.disabled():
        expected = answer_there(model, ids)
    with spawn.Pool(1) as pool:
        pool.apply(put_one, (store,))
        # A model with a memory arrives as the bare one.
        assert pool.apply(answer_there, (model, ids)) == pytest.approx(expected, abs=1e-6)
    assert store.get("from there").state.equals(state_of(5))
