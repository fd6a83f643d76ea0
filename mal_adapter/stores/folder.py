"""`FolderStore`: a file per session, for processes that share a file system."""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from mal_adapter.errors import SessionConflictError, StateFormatError, StoreError
from mal_adapter.memory.state import MemoryState
from mal_adapter.serialization.atomic import remove_leftovers, write_atomically
from mal_adapter.stores.base import Stored, check_ttl
from mal_adapter.stores.folder_files import explained, file_lock, file_name, session_id_of

__all__ = ["FolderStore"]

LOCK_NAME = ".mal_adapter.lock"


class FolderStore:
    """One file per session in a folder, which is created if it does not exist. `MemoryState.load` reads the files.

    Processes and threads may share the folder if its file system supports flock between them, as local file systems and
    NFS 4 do. A reader sees the old state or the new one, also after a crash. A state survives a power cut once `put`
    has returned. Files with other names are ignored.

    Args:
        folder: Where the files are.
        ttl_s: A session expires this many seconds after its last put, by the file's mtime; None means never.

    Raises:
        ConfigError: `ttl_s` is not positive.
        StoreError: The folder can't be created, or the system is Windows, which has no flock.

    Example:
        >>> import tempfile
        >>> from mal_adapter import MemoryAdapter, MemoryConfig
        >>> adapter = MemoryAdapter(MemoryConfig(hidden_size=32, memory_dim=16)).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = FolderStore(folder)
        ...     version = store.put("call/1", adapter.initial_state())
        ...     state = MemoryState.load(f"{folder}/call%2F1.safetensors")
        ...     list(store), store.get("call/1").version == version
        (['call/1'], True)
    """

    def __init__(self, folder: str | os.PathLike[str], ttl_s: float | None = None) -> None:
        check_ttl(ttl_s)
        if os.name != "posix":
            raise StoreError(f"FolderStore({os.fspath(folder)!r}) needs flock, which {os.name} lacks; use RedisStore")
        self.folder = Path(folder)
        self.ttl_s = ttl_s
        with explained("create", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)

    def get(self, session_id: str) -> Stored | None:
        """The state of a session, on the CPU, or None if it does not exist or has expired.

        Raises:
            SessionError: `session_id` is not valid, or too long for a file name.
            StateFormatError: The file is damaged, or is not a state; the message names it.
            StoreError: The folder or the file can't be read.
        """
        path = self._path(session_id)
        with explained("read", path):
            data = self._read(path)
        if data is None:
            return None
        try:
            return Stored(MemoryState.from_bytes(data), _version(data))
        except StateFormatError as error:
            raise StateFormatError(f"{path}: {error}; drop this session, or restore the file") from error

    def put(self, session_id: str, state: MemoryState, version: str | None = None) -> str:
        """Save `state` in its file completely or, on an error, not at all.

        Arguments and result are those of `SessionStore.put`.

        Raises:
            SessionConflictError: Another writer has saved another state since; its state stays.
            SessionError: `session_id` is not valid, or too long for a file name.
            StoreError: The folder can't be written to, or the disk is full.
        """
        path = self._path(session_id)
        data = state.to_bytes()
        with explained("write", path), self._locked():
            kept = self._read(path)
            if kept is not None and _version(kept) != version:
                raise SessionConflictError(
                    f"another writer has saved session {session_id!r} in {path} since; get it again"
                )
            write_atomically(path, data)
        return _version(data)

    def drop(self, session_id: str) -> bool:
        """Delete a session's file, readable or not. Returns whether it existed.

        Raises:
            SessionError: `session_id` is not valid, or too long for a file name.
            StoreError: The folder can't be written to.
        """
        path = self._path(session_id)
        with explained("delete", path), self._locked():
            try:
                expired = self._expired(path.stat())
                path.unlink()
            except FileNotFoundError:
                return False
            return not expired

    def __iter__(self) -> Iterator[str]:
        """The ids of all current sessions, in no particular order.

        Raises:
            StoreError: The folder can't be read.
        """
        session_ids = []
        with explained("list", self.folder), os.scandir(self.folder) as entries:
            for entry in entries:
                session_id = session_id_of(entry.name)
                if session_id is None:
                    continue
                with contextlib.suppress(FileNotFoundError):  # dropped since
                    if self._expired(entry.stat()):
                        self._delete_expired(Path(entry.path))
                    elif entry.is_file():
                        session_ids.append(session_id)
        return iter(session_ids)

    def __repr__(self) -> str:
        return f"FolderStore({str(self.folder)!r}, ttl_s={self.ttl_s})"

    def _path(self, session_id: str) -> Path:
        return self.folder / file_name(session_id)

    def _read(self, path: Path) -> bytes | None:
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                data = file.read()
        except FileNotFoundError:
            self.folder.stat()  # raises if a share is not mounted, which must not look like a new session
            return None
        if not self._expired(status):
            return data
        self._delete_expired(path)
        return None

    def _expired(self, status: os.stat_result) -> bool:
        return self.ttl_s is not None and time.time() - status.st_mtime >= self.ttl_s

    def _delete_expired(self, path: Path) -> None:
        # Without the lock, another writer could replace the file between the check and the deletion. A reader without
        # permission to write skips it; so does a put, which holds the lock and replaces the file itself.
        with contextlib.suppress(OSError), self._locked(wait=False):
            if self._expired(path.stat()):
                path.unlink()

    def _locked(self, *, wait: bool = True) -> AbstractContextManager[None]:
        return file_lock(self.folder / LOCK_NAME, wait=wait)


def _version(data: bytes) -> str:
    """A hash of the content, so that no version has to be stored. Each utterance changes the counters in it."""
    return hashlib.sha256(data).hexdigest()
