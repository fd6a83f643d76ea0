"""What breaks leaves the old state or the new one, says what to do, and is over when the cause is."""

import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mal_adapter import MemoryState
from mal_adapter.errors import SessionConflictError, StateFormatError, StoreError
from mal_adapter.serialization.atomic import TEMPORARY_PREFIX
from mal_adapter.stores import FolderStore
from tests.stores.states import state_of


def fork(function: Callable[[], None]) -> int:
    """Run `function` in a copy of this process, which exits with 1 if it raises; far quicker than to import torch."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            sys.__stderr__.write(traceback.format_exc())
            sys.__stderr__.flush()
        finally:
            os._exit(1)
    return child


def run_in_child(function: Callable[[], None]) -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(fork(function), 0)[1]) == 0


def filled(value: int) -> MemoryState:
    """A state of a megabyte that is `value` all over."""
    return state_of(1, width=180).map(lambda t: torch.full_like(t, value))


def save_for_ever(folder: Path, report: int) -> None:
    store = FolderStore(folder)
    stored = store.get("call")
    value, version = int(stored.state.utterances), stored.version
    while True:
        value += 1
        version = store.put("call", filled(value), version)
        os.write(report, struct.pack("<q", value))


@pytest.mark.slow
def test_two_hundred_kills_leave_the_old_state_or_the_new(tmp_path: Path):
    store, moments, landed = FolderStore(tmp_path), random.Random(0), Counter()
    version = store.put("call", filled(0))
    size = len(filled(0).to_bytes())
    for _ in range(200):
        reading, writing = os.pipe()
        child = fork(lambda writing=writing: save_for_ever(tmp_path, writing))
        os.close(writing)
        with open(reading, "rb") as reports:
            (confirmed,) = struct.unpack("<q", reports.read(8))
            time.sleep(moments.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            if rest := reports.read():
                (confirmed,) = struct.unpack("<q", rest[-8:])
        with store._locked(wait=False):  # raises if the lock were lost
            stored = store.get("call")
        value = int(stored.state.utterances)
        assert confirmed <= value <= confirmed + 1
        assert stored.state.equals(filled(value))
        assert list(store) == ["call"]
        leftovers = list(tmp_path.glob(f"{TEMPORARY_PREFIX}*"))
        if leftovers:
            landed["before the file was whole" if leftovers[0].stat().st_size < size else "before the rename"] += 1
            leftovers[0].unlink()
        else:
            landed["after the rename" if value > confirmed else "around the write"] += 1
        with pytest.raises(SessionConflictError):
            store.put("call", filled(-1), version)
        version = store.put("call", filled(value), stored.version)
    print("200 kills landed", dict(landed))
    assert landed["before the file was whole"] + landed["before the rename"] >= 10


@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda data: b"", lambda data: b"x" * len(data)])
def test_a_damaged_file_is_named_and_can_be_dropped(damage: Callable[[bytes], bytes], tmp_path: Path):
    store = FolderStore(tmp_path)
    version = store.put("call", state_of(1))
    path = tmp_path / "call.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StateFormatError, match=r"call\.safetensors: .*drop this session"):
        store.get("call")
    with pytest.raises(SessionConflictError):
        store.put("call", state_of(2), version)
    assert list(store) == ["call"]
    assert store.drop("call")
    store.put("call", state_of(2), version)


def test_a_full_disk_is_a_store_error_and_the_old_state_stays(tmp_path: Path):
    store = FolderStore(tmp_path)
    version = store.put("call", state_of(1))

    def put_too_much() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write() fails instead, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(StoreError, match=r"can't write .*call\.safetensors: File too large; raise the limit"):
            store.put("call", filled(1), version)

    run_in_child(put_too_much)
    assert store.get("call").state.equals(state_of(1))
    assert not list(tmp_path.glob(f"{TEMPORARY_PREFIX}*"))
    store.put("call", filled(1), version)


def test_a_folder_that_is_gone_is_a_store_error_not_a_new_session(tmp_path: Path):
    folder = tmp_path / "sessions"
    store = FolderStore(folder)
    version = store.put("call", state_of(1))
    folder.rename(tmp_path / "unmounted")
    for access in (
        lambda: store.get("call"),
        lambda: store.put("call", state_of(2), version),
        lambda: store.drop("call"),
        lambda: list(store),
    ):
        with pytest.raises(StoreError, match=r"sessions.*the folder is gone"):
            access()
    (tmp_path / "unmounted").rename(folder)
    store.put("call", state_of(2), version)
    shutil.rmtree(folder)
    assert list(FolderStore(folder)) == []


def test_a_folder_that_may_not_be_written_to_can_be_read():
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, whose parents are closed to other users
        store = FolderStore(folder, ttl_s=3600)
        version = store.put("call", state_of(1))
        store.put("old", state_of(1))
        os.utime(Path(folder) / "old.safetensors", (0, 0))
        os.chmod(folder, 0o555)

        def read_and_try_to_write() -> None:
            if os.geteuid() == 0:  # whom permissions do not stop
                os.setegid(65534)
                os.seteuid(65534)
            assert store.get("call").state.equals(state_of(1))
            assert store.get("old") is None
            assert list(store) == ["call"]
            for access in (lambda: store.put("call", state_of(2), version), lambda: store.drop("call")):
                with pytest.raises(StoreError, match=r"call\.safetensors: Permission denied; check its owner"):
                    access()

        run_in_child(read_and_try_to_write)
        os.chmod(folder, 0o755)
        assert store.get("call").state.equals(state_of(1))
