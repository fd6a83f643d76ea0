"""The data of a hub, in memory: repositories with commits, branches, tags and pull requests."""

import hashlib
from dataclasses import dataclass, field

__all__ = ["Entry", "Repo", "Store"]


@dataclass(frozen=True)
class Entry:
    """A file of a commit; those under LFS are named by their sha256, the others as git names a blob."""

    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass
class Repo:
    """One model repository. `refs` are branches, tags and pull requests, each the hash of a commit."""

    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pull_requests: int = 0

    def __post_init__(self) -> None:
        self.commit("main", {".gitattributes": Entry(b"*.safetensors filter=lfs\n", False)}, "initial commit")

    def resolve(self, revision: str) -> str | None:
        """The commit hash of a branch, tag, pull request or commit hash."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def commit(self, ref: str, changes: dict[str, Entry], message: str, onto: str | None = None) -> str:
        """Add a commit to `ref` and return its hash. Its parent is the commit of `onto`, or of `ref` if None."""
        parent = self.refs.get(onto or ref, "")
        files = {**self.commits.get(parent, {}), **changes}
        content = [parent, message, *(f"{name} {files[name].etag}" for name in sorted(files))]
        commit = hashlib.sha1("\n".join(content).encode()).hexdigest()
        self.commits[commit], self.messages[commit], self.refs[ref] = files, message, commit
        return commit

    def __getitem__(self, name: str) -> bytes:
        """A file's bytes on the main branch."""
        return self.commits[self.refs["main"]][name].data


@dataclass
class Store:
    """All repositories, LFS objects, and users by their tokens. A user may write what is under their name."""

    users: dict[str, str] = field(default_factory=lambda: {"hf_alice": "alice", "hf_bob": "bob"})
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
