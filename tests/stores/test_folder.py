"""FolderStore: plain files that leave the folder as they should."""

import os
import stat
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mal_adapter import MemoryState
from mal_adapter.errors import SessionError, StoreError
from mal_adapter.serialization.atomic import TEMPORARY_PREFIX
from mal_adapter.stores import FolderStore
from mal_adapter.stores.folder import LOCK_NAME
from mal_adapter.stores.folder_files import file_name, session_id_of
from tests.stores.states import state_of


def test_a_session_is_a_state_file(tmp_path: Path):
    FolderStore(tmp_path / "a" / "b").put("call-1", state_of(3))
    assert MemoryState.load(tmp_path / "a" / "b" / "call-1.safetensors").equals(state_of(3))


def test_a_state_file_is_a_session(tmp_path: Path):
    store = FolderStore(tmp_path)
    state_of(3).save(tmp_path / "call-1.safetensors")
    stored = store.get("call-1")
    assert stored.state.equals(state_of(3))
    assert store.put("call-1", state_of(4), stored.version)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_any_id_has_a_name_of_its_own_that_stays_in_the_folder(session_id: str):
    name = file_name(session_id)
    assert session_id_of(name) == session_id
    assert name == name.lower() or "%" in name
    assert not name.startswith(".")
    assert "/" not in name
    assert name.isascii()
    assert name.isprintable()


@given(*[st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=3)] * 2)
def test_no_two_ids_share_a_name_even_where_case_is_ignored(a: str, b: str):
    for other in (b, a.swapcase(), a.upper(), a.lower()):
        assert (a == other) == (file_name(a).casefold() == file_name(other).casefold())


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), max_size=30))
def test_a_name_is_either_of_one_session_or_of_none(name: str):
    for file in (name, name + ".safetensors"):
        session_id = session_id_of(file)
        assert session_id is None or file_name(session_id) == file


def test_an_id_too_long_for_a_file_is_refused_with_the_reason(tmp_path: Path):
    store = FolderStore(tmp_path)
    longest = "a" * (255 - len(".safetensors"))
    store.put(longest, state_of(1))
    assert list(store) == [longest]
    for session_id in (longest + "a", "A" * 82, "é" * 41):
        with pytest.raises(SessionError, match=r"file name of \d+ bytes, and files allow 255"):
            store.put(session_id, state_of(1))


def test_other_files_are_not_listed_and_stay(tmp_path: Path):
    names = ["Notes.safetensors", "notes.txt", ".hidden.safetensors", "%4.safetensors", "%61.safetensors", ".x.tmp"]
    names += [".safetensors", "%FF.safetensors", "%c3%a9.safetensors"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / "folder.safetensors").mkdir()
    store = FolderStore(tmp_path, ttl_s=3600)
    store.put("call", state_of(1))
    assert list(store) == ["call"]
    assert {*names, "folder.safetensors"} <= set(os.listdir(tmp_path))


def test_old_temporaries_are_cleaned_up_at_opening_and_none_is_listed(tmp_path: Path):
    old, new = (tmp_path / f"{TEMPORARY_PREFIX}{name}.tmp" for name in ("old", "new"))
    for path, age_s in ((old, 7200), (new, 60)):
        path.write_bytes(b"half a state")
        os.utime(path, (time.time() - age_s,) * 2)
    assert list(FolderStore(tmp_path)) == []
    assert not old.exists()
    assert new.exists()


def test_a_put_leaves_the_session_and_the_lock_and_nothing_else(tmp_path: Path):
    store = FolderStore(tmp_path)
    store.put("call", state_of(2), store.put("call", state_of(1)))
    assert sorted(os.listdir(tmp_path)) == sorted([LOCK_NAME, "call.safetensors"])


def test_an_expired_file_is_deleted_when_it_is_met(tmp_path: Path):
    store = FolderStore(tmp_path, ttl_s=60)
    for session_id, meet in {"read": lambda: store.get("read"), "listed": lambda: list(store)}.items():
        store.put(session_id, state_of(1))
        path = tmp_path / f"{session_id}.safetensors"
        os.utime(path, (time.time() - 61,) * 2)
        meet()
        assert not path.exists()


def test_files_can_be_shared_as_the_umask_says(tmp_path: Path):
    FolderStore(tmp_path).put("call", state_of(1))
    (tmp_path / "plain").write_bytes(b"")
    plain = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert stat.S_IMODE((tmp_path / "call.safetensors").stat().st_mode) == plain
    assert stat.S_IMODE((tmp_path / LOCK_NAME).stat().st_mode) == plain


def test_a_fork_while_the_lock_is_held_does_not_keep_it(tmp_path: Path):
    """As a DataLoader's worker may be forked while another thread puts."""
    store = FolderStore(tmp_path)
    until, done = os.pipe()
    with store._locked():
        child = os.fork()
        if child == 0:
            os.close(done)
            os.read(until, 1)
            os._exit(0)
    with store._locked(wait=False):
        pass
    os.close(done)
    os.close(until)
    assert os.waitpid(child, 0)[1] == 0


def test_a_file_in_the_folders_place_is_a_store_error(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file", tmp_path / "file" / "sessions"):
        with pytest.raises(StoreError, match="it is a file and not a folder"):
            FolderStore(folder)
