"""Whose memory is meant: the sessions that are open, and the states they leave."""

import dataclasses
import hashlib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from mal_adapter.errors import SessionConflictError, SessionError, StoreError, UnsavedSessionWarning
from mal_adapter.state import MemoryState
from mal_adapter.stores import SessionStore
from mal_adapter.stores.checks import id_bytes

__all__ = ["Call", "Prompt", "Session", "SessionStates"]


class SessionStates(MutableMapping[str, MemoryState]):
    """The states of all dialogues by session id, each of batch size 1 and detached, as they lie in a store.

    Setting a state checks that it fits the adapter. Copy a state to fork a dialogue; delete it to forget one. What the
    store could not keep while it was out of reach stays in this process, and goes on from there, until it is saved.

    Args:
        store: Where the states lie.
        check: Called with each state that is set; raises if the state does not fit.

    Example:
        >>> from mal_adapter import MemoryAdapter, MemoryConfig
        >>> from mal_adapter.stores import InMemoryStore
        >>> adapter = MemoryAdapter(MemoryConfig(hidden_size=32, memory_dim=16)).eval()
        >>> states = SessionStates(InMemoryStore(), adapter.check_state)
        >>> states["call-42"] = adapter.initial_state()
        >>> states["what-if"] = states["call-42"].clone()
        >>> sorted(states)
        ['call-42', 'what-if']
    """

    def __init__(self, store: SessionStore, check: Callable[[MemoryState], None]) -> None:
        self.store = store
        self._check = check
        self._versions: dict[str, str | None] = {}  # of the sessions that are open, as this process knows them
        self._unsaved: dict[str, _Unsaved] = {}
        self._lock = threading.Lock()

    @property
    def unsaved(self) -> list[str]:
        """The sessions whose last state is in this process only."""
        return sorted(self._unsaved)

    def __getitem__(self, session_id: str) -> MemoryState:
        state, _ = self._find(session_id)
        if state is None:
            raise KeyError(session_id)
        return state

    def __setitem__(self, session_id: str, state: MemoryState) -> None:
        id_bytes(session_id)  # raises for what is none
        self._check(state)
        if state.batch_size != 1:
            raise SessionError(f"a session's state has batch size 1, this one {state.batch_size}; split() it")
        self._must_be_closed(session_id, "set its state before the block, or after it")
        stored = self.store.get(session_id)
        self.store.put(session_id, state.detach(), None if stored is None else stored.version)
        self._unsaved.pop(session_id, None)

    def __delitem__(self, session_id: str) -> None:
        self._must_be_closed(session_id, "drop it after its block")
        dropped = self.store.drop(session_id)
        if self._unsaved.pop(session_id, None) is None and not dropped:
            raise KeyError(session_id)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self.store, *self._unsaved)))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"SessionStates({self.store!r}, {len(self._versions)} open, {len(self._unsaved)} unsaved)"

    def clear(self) -> None:
        """Forget every session."""
        for session_id in list(self):
            with suppress(KeyError):  # another process was faster
                del self[session_id]

    def flush(self) -> None:
        """Save what the store could not keep when it was written.

        Raises:
            StoreError: The store is still out of reach; the states stay in this process.
            SessionConflictError: Another process has continued one of these sessions. Its state stays, this process's
                is the error's `state`; flush again for the others.
        """
        for session_id in self.unsaved:
            self._save_again(session_id)

    @contextmanager
    def opened(self, session_ids: Sequence[str]) -> Iterator[dict[str, MemoryState]]:
        """Hold `session_ids` for one session at a time: a dialogue that two threads continue would lose an update.
        Gives the states of those that have one."""
        with self._lock:
            if busy := self._versions.keys() & set(session_ids):
                raise SessionError(f"sessions {sorted(busy)} are open in another block, thread or task; wait for it")
            self._versions.update(dict.fromkeys(session_ids))
        try:
            found = {}
            for session_id in session_ids:
                state, self._versions[session_id] = self._find(session_id)
                if state is not None:
                    found[session_id] = state
            yield found
            for session_id in self._unsaved.keys() & set(session_ids):
                self._save_again(session_id)
        finally:
            with self._lock:
                for session_id in session_ids:
                    del self._versions[session_id]

    def keep(self, states: Mapping[str, MemoryState]) -> None:
        """Save the states that open sessions have reached; unchecked, for the session itself. A store that is out of
        reach is no error here, since the host has answered: the block's end tries again, and raises.

        Raises:
            SessionConflictError: Another process has continued one of the sessions; the others are saved.
        """
        conflict, outage, unsaved = None, None, []
        for session_id, state in states.items():
            try:
                self._versions[session_id] = self._save(session_id, state, self._versions[session_id])
            except SessionConflictError as error:
                conflict = error
            except StoreError as error:
                outage = error
                unsaved.append(session_id)
        if outage is not None:
            message = f"{', '.join(map(repr, unsaved))} kept in this process only: {outage}"
            warnings.warn(message, UnsavedSessionWarning, stacklevel=2)
        if conflict is not None:
            raise conflict

    def _save_again(self, session_id: str) -> None:
        unsaved = self._unsaved[session_id]
        self._save(session_id, unsaved.state, unsaved.version)

    def _find(self, session_id: str) -> tuple[MemoryState | None, str | None]:
        if (unsaved := self._unsaved.get(session_id)) is not None:
            return unsaved.state, unsaved.version
        stored = self.store.get(session_id)
        return (None, None) if stored is None else stored

    def _save(self, session_id: str, state: MemoryState, version: str | None) -> str:
        before = self._unsaved.get(session_id)
        attempts = set() if before is None else before.attempts
        try:
            if attempts and (stored := self.store.get(session_id)) is not None and _digest(stored.state) in attempts:
                version = stored.version  # it had arrived, and only the answer was lost
            version = self.store.put(session_id, state, version)
        except SessionConflictError as error:
            self._unsaved.pop(session_id, None)
            error.state = state
            raise
        except StoreError:
            self._unsaved[session_id] = _Unsaved(state, version, attempts | {_digest(state)})
            raise
        self._unsaved.pop(session_id, None)
        return version

    def _must_be_closed(self, session_id: str, remedy: str) -> None:
        if session_id in self._versions:
            raise SessionError(f"session {session_id!r} is open; {remedy}")


@dataclasses.dataclass(frozen=True)
class _Unsaved:
    """A state that a store failed to keep, the version it follows, and digests of all that it failed to keep since."""

    state: MemoryState
    version: str | None
    attempts: set[bytes]


def _digest(state: MemoryState) -> bytes:
    return hashlib.sha256(state.to_bytes()).digest()


@dataclasses.dataclass(eq=False)
class Prompt:
    """What a call fed to the host: to recognise a generate() without KV cache that feeds it again and again, and to
    complete an utterance that goes on while the host speaks.

    Attributes:
        tokens: (batch, seq_len) input ids, or (batch, seq_len, hidden_size) input embeddings.
        features: The audio features.
        before: What was written before this utterance.
        rows: (batch, audio tokens, hidden_size) what the hooked layer gave at its audio positions, and
        valid: (batch, audio tokens) which of them are no padding; both None unless the utterance can go on.
    """

    tokens: Shaped[Tensor, "batch seq_len ..."]
    features: Shaped[Tensor, "..."]
    before: MemoryState
    rows: Float[Tensor, "batch tokens hidden_size"] | None = None
    valid: Bool[Tensor, "batch tokens"] | None = None


@dataclasses.dataclass(eq=False)
class Call:
    """One top-level forward of the host, while it runs.

    Attributes:
        owner: The module whose hooks opened the call; only its end commits.
        state: What this forward reads.
        entered: The hooked modules it has gone into.
        records_grad: Whether autograd recorded when it began.
        mask: (batch, seq_len) bool audio positions, or None for a call without audio.
        text_only: Whether the host's own arguments say that there is no audio.
        features: The audio features of the call, if there are any.
        repeated: Whether it feeds the last prompt again, so that nothing is to be written.
        prompt: To be remembered if the call writes.
        earlier: The utterance's part that went before on the KV cache.
        pending: The state to commit when the forward has succeeded.
        postponed: Whether the hooked layer runs in a checkpoint, so that its hook is called after that.
    """

    owner: object
    state: MemoryState
    entered: list[object] = dataclasses.field(default_factory=list)
    records_grad: bool = dataclasses.field(default_factory=torch.is_grad_enabled)
    mask: Bool[Tensor, "batch seq_len"] | None = None
    text_only: bool = False
    features: Shaped[Tensor, "..."] | None = None
    repeated: bool = False
    prompt: Prompt | None = None
    earlier: Prompt | None = None
    pending: MemoryState | None = None
    postponed: bool = False


class Session:
    """The dialogues of one `with memory.session(...)` block; row i of a batch belongs to `ids[i]`.

    Attributes:
        ids: Session ids; None for an anonymous dialogue.
        state: What has been written so far, one row per id. While the adapter is in training mode it carries the
            autograd graph through the block.
        write: Whether utterances are written, or only read.
        audio_mask: The user's mask, which wins over detection.
    """

    def __init__(
        self,
        ids: tuple[str | None, ...],
        state: MemoryState,
        states: SessionStates,
        write: bool,
        audio_mask: Bool[Tensor, "prompts seq_len"] | None,
    ) -> None:
        self.ids = ids
        self.state = state
        self.write = write
        self.audio_mask = audio_mask
        self.call: Call | None = None
        self._states = states
        self._last: Prompt | None = None

    def narrow(self, ids: Sequence[str]) -> None:
        """Go on with these of the dialogues alone, in this order, when others have ended; what they wrote in this
        block, and its autograd graph, goes on.

        Raises:
            SessionError: An id is not one of the session's, or is repeated.
        """
        if not ids or len(set(ids)) < len(ids) or not set(ids) <= set(self.ids):
            raise SessionError(f"a session of {list(self.ids)} can't go on with {list(ids)}; give some of its own ids")
        rows = torch.tensor([self.ids.index(i) for i in ids])
        self.ids, self.state, self._last = tuple(ids), self.state.rows(rows), None

    def begin(self, module: object) -> None:
        """A forward of `module` starts. The outermost one owns the call; one left over from an interrupt is dropped."""
        if self.call is None or module in self.call.entered:
            self.call = Call(module, self.state)
        self.call.entered.append(module)

    def feed(
        self,
        tokens: Shaped[Tensor, "batch seq_len ..."] | None,
        features: Shaped[Tensor, "..."] | None,
        *,
        mode: str | None,
        cached: bool,
    ) -> None:
        """The running call carries audio. If it is the last prompt and what was generated since, fed again for want
        of a KV cache, it reads the state from before that prompt and writes nothing. In mode "all" what was generated
        since is audio too, whether fed alone or again: the utterance is read and written anew, as a whole."""
        if self.call is None or features is None:
            return
        self.call.features = features
        if tokens is None:
            return
        last = self._last
        self.call.prompt = Prompt(tokens, features, self.state)
        if last is None:
            return
        if mode == "all" and cached:
            self.call.earlier = last
        elif not _repeats(last, tokens, features, grown=mode == "all"):
            return
        self.call.state = self.call.prompt.before = last.before
        self.call.repeated = mode != "all"

    def end(self, owner: object, *, succeeded: bool, keep_graph: bool) -> bool:
        """A forward of `owner` ended; commits what it wrote if it succeeded. Returns whether a write was skipped."""
        call = self.call
        if call is None or call.owner is not owner:
            return False
        self.call = None
        if not succeeded:
            return False
        if call.prompt is not None and not call.repeated:
            self._last = call.prompt
        if call.pending is None:
            return False
        skipped = bool((call.pending.skipped_writes > self.state.skipped_writes).any())
        reached = call.pending.map(_not_inference)
        detached = reached.detach()
        self.state = reached if keep_graph else detached
        rows = [detached] if len(self.ids) == 1 else detached.split()
        self._states.keep({i: row for i, row in zip(self.ids, rows, strict=True) if i is not None})
        return skipped


def _repeats(
    last: Prompt, tokens: Shaped[Tensor, "batch seq_len ..."], features: Shaped[Tensor, "..."], *, grown: bool
) -> bool:
    """Whether a longer prompt begins with the last one; its features are the same, or have `grown` too."""
    longer = tokens.shape[1] > last.tokens.shape[1]
    same_shape = features.shape == last.features.shape
    return longer and (grown or same_shape) and _begins(tokens, last.tokens) and _begins(features, last.features)


def _begins(whole: Tensor, part: Tensor) -> bool:
    if whole is part:
        return True
    return whole.dim() == part.dim() and torch.equal(whole[tuple(map(slice, part.shape))], part)


def _not_inference(tensor: Tensor) -> Tensor:
    """A tensor made in inference mode could not take part in later training; its clone outside can."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()
