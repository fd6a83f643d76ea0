"""The end of a server with a store that fails, and the metrics of one."""

import logging
import math
import threading
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mal_adapter import MemoryState
from mal_adapter.errors import StoreError
from mal_adapter.server.flush import flush
from mal_adapter.server.metrics import Metrics
from mal_adapter.stores import FolderStore, InMemoryStore, unsaved
from mal_adapter.stores.states import SessionStates
from tests.stores.states import state_of

pytestmark = pytest.mark.filterwarnings("ignore::mal_adapter.errors.UnsavedSessionWarning")


class Faulty:
    """A store that can't be written until `release` is set, and that hangs or fails meanwhile."""

    def __init__(self, hangs: bool) -> None:
        self.inner = InMemoryStore()
        self.hangs = hangs
        self.release = threading.Event()

    def get(self, session_id: str):
        return self.inner.get(session_id)

    def put(self, session_id: str, state: MemoryState, version: str | None = None) -> str:
        if self.hangs and threading.current_thread().name == "mal_adapter_flush":
            assert self.release.wait(60)
        if not self.release.is_set():
            raise StoreError("can't write")
        return self.inner.put(session_id, state, version)

    def drop(self, session_id: str) -> bool:
        return self.inner.drop(session_id)

    def __iter__(self) -> Iterator[str]:
        raise StoreError("can't list")


def unsaved_in(store: Faulty, monkeypatch: pytest.MonkeyPatch) -> SessionStates:
    monkeypatch.setattr(unsaved, "FIRST_S", 3600.0)  # no attempt is due by time
    states = SessionStates(store, lambda state: None)
    with pytest.raises(StoreError), states.opened(["a"]):
        states.keep({"a": state_of(1)})
    assert states.unsaved == ["a"]
    return states


@pytest.mark.parametrize("hangs", [False, True])
def test_a_flush_ends_although_the_store_fails_or_hangs_and_names_what_is_lost(hangs, monkeypatch, caplog):
    store = Faulty(hangs)
    states = unsaved_in(store, monkeypatch)
    assert not flush(states, timeout_s=0.2)
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert any("'a'" in message for message in errors)
    store.release.set()
    assert flush(states)
    assert store.get("a") is not None


def test_metrics_of_a_store_that_can_not_be_listed(monkeypatch):
    states = unsaved_in(Faulty(hangs=False), monkeypatch)
    samples = samples_of(Metrics(states, lambda: 3, lambda: 7))
    assert math.isnan(samples["mal_adapter_sessions"])
    assert samples["mal_adapter_unsaved_sessions"] == 1
    assert (samples["mal_adapter_queue_length"], samples["mal_adapter_pending_requests"]) == (3, 7)


def test_the_sessions_of_a_folder_are_not_counted_at_every_scrape(tmp_path, monkeypatch):
    store = FolderStore(tmp_path)
    metrics = Metrics(SessionStates(store, lambda state: None), lambda: 0, lambda: 0)
    counts, now = [], 1000.0
    monkeypatch.setattr("mal_adapter.server.metrics.time.monotonic", lambda: now)
    for session_id, now in (("a", 1000.0), ("b", 1014.0), ("c", 1016.0)):  # noqa: B007
        store.put(session_id, state_of(1))
        counts.append(samples_of(metrics)["mal_adapter_sessions"])
    assert counts == [1, 1, 3]


def samples_of(metrics: Metrics) -> dict[str, float]:
    families = text_string_to_metric_families(metrics.text().decode())
    return {sample.name: sample.value for family in families for sample in family.samples}
