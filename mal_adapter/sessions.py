"""A session: the dialogues of one block, and the forwards that run in it."""

import asyncio
import dataclasses
import functools
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from mal_adapter.errors import CopyError, SessionError
from mal_adapter.session_states import SessionStates
from mal_adapter.state import MemoryState

__all__ = ["Call", "Prompt", "Session"]


# How many utterances of a block are remembered once several tasks or threads have used it; before that, the last one.
_REMEMBERED = 8


@dataclasses.dataclass(eq=False)
class Prompt:
    """What a call fed to the host: to recognise a generate() without KV cache that feeds it again and again, and to
    complete an utterance that continues while the host speaks.

    Attributes:
        tokens: (batch, seq_len) input ids, or (batch, seq_len, hidden_size) input embeddings.
        features: The audio features.
        before: What was written before this utterance.
        length: How many tokens were fed last: the prompt's, and those that were generated since.
        cache: A weak reference to the KV cache that was filled, where it is known.
        rows: (batch, audio tokens, hidden_size) what the hooked layer gave at its audio positions, and
        valid: (batch, audio tokens) which of them are no padding; both None unless the utterance can continue.
    """

    tokens: Shaped[Tensor, "batch seq_len ..."]
    features: Shaped[Tensor, "..."]
    before: MemoryState
    length: int
    cache: "weakref.ref[Any] | None" = None
    rows: Float[Tensor, "batch tokens hidden_size"] | None = None
    valid: Bool[Tensor, "batch tokens"] | None = None


@dataclasses.dataclass(eq=False)
class Call:
    """One top-level forward of the host, while it runs.

    Attributes:
        owner: The module whose hooks opened the call; only its end commits.
        state: What this forward reads.
        thread: The thread that runs it.
        entered: The hooked modules it has gone into.
        records_grad: Whether autograd recorded when it began.
        mask: (batch, seq_len) bool audio positions, or None for a call without audio.
        text_only: Whether the host's own arguments say that there is no audio.
        features: The audio features of the call, if there are any.
        repeated: Whether it feeds an earlier prompt again, so that nothing is to be written.
        prompt: To be remembered if the call writes.
        continues: The prompt that it feeds again, or whose utterance it continues.
        earlier: The utterance's part that went before on the KV cache.
        pending: The state to commit when the forward has succeeded.
        postponed: Whether the hooked layer runs in a checkpoint, so that its hook is called after that.
    """

    owner: object
    state: MemoryState
    thread: threading.Thread = dataclasses.field(default_factory=threading.current_thread)
    entered: list[object] = dataclasses.field(default_factory=list)
    records_grad: bool = dataclasses.field(default_factory=torch.is_grad_enabled)
    mask: Bool[Tensor, "batch seq_len"] | None = None
    text_only: bool = False
    features: Shaped[Tensor, "..."] | None = None
    repeated: bool = False
    prompt: Prompt | None = None
    continues: Prompt | None = None
    earlier: Prompt | None = None
    pending: MemoryState | None = None
    postponed: bool = False


class Session:
    """The dialogues of one `with memory.session(...)` block; row i of a batch belongs to `ids[i]`.

    Tasks and threads that share the block may run forwards in it at once, as long as only one of them writes.

    Attributes:
        ids: Session ids; None for an anonymous dialogue.
        state: What has been written so far, one row per id. While the adapter is in training mode it carries the
            autograd graph through the block.
        write: Whether utterances are written, or only read.
        audio_mask: The user's mask, which wins over detection.
        used: Whether a forward has begun in the block.
        closed: Whether the block has been left.
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
        self.used = False
        self.closed = False
        self._states = states
        self._calls: dict[int, Call] = {}  # by the thread that runs them
        self._writer: Call | None = None
        self._prompts: list[Prompt] = []  # the last one at the end
        self._task: object = None  # that fed it
        self._shared = False
        self._rereading: set[int] = set()  # the threads that do
        self._lock = threading.Lock()  # of what several threads change: writer, state and prompts

    @property
    def call(self) -> Call | None:
        """The forward that this thread is running."""
        return self._calls.get(threading.get_ident())

    def __getstate__(self) -> NoReturn:
        raise CopyError(
            "an open session is one block in one process and can't be pickled or deep-copied; a state can: "
            "memory.states[id]. In another process call attach_memory, and open the session by its id there"
        )

    def narrow(self, ids: Sequence[str]) -> None:
        """Continue with these of the dialogues alone, in this order, when others have ended; what they wrote in this
        block, and its autograd graph, is kept.

        Raises:
            SessionError: An id is not one of the session's, or is repeated.
        """
        if not ids or len(set(ids)) < len(ids) or not set(ids) <= set(self.ids):
            raise SessionError(f"a session of {list(self.ids)} can't go on with {list(ids)}; give some of its own ids")
        rows = torch.tensor([self.ids.index(i) for i in ids])
        self.ids, self.state, self._prompts = tuple(ids), self.state.rows(rows), []

    @contextmanager
    def rereading(self) -> Iterator[None]:
        """Within this block, this thread's forwards feed a prompt of this session again with any tokens behind it. They
        read what the prompt read, and write nothing."""
        thread = threading.get_ident()
        self._rereading.add(thread)
        try:
            yield
        finally:
            self._rereading.discard(thread)

    def begin(self, module: object) -> None:
        """A forward of `module` starts. The outermost one owns the call; one left over from an interrupt is dropped."""
        self.used = True
        call = self.call
        if call is None or module in call.entered:
            if call is not None and call is self._writer:
                self._writer = None
            call = self._calls[threading.get_ident()] = Call(module, self.state)
        call.entered.append(module)

    def feed(
        self,
        tokens: Shaped[Tensor, "batch seq_len ..."] | None,
        features: Shaped[Tensor, "..."] | None,
        *,
        mode: str | None,
        cache: object | None,
        cached: bool,
    ) -> None:
        """The running call carries audio. If it is the prompt of a generate() and what was generated since, fed again
        for want of a KV cache, it reads the state from before that prompt and writes nothing. In mode "all" what was
        generated since is audio too, whether fed alone or again: the utterance is read and written again, as a whole.

        Args:
            tokens: What is fed, (batch, seq_len) ids or (batch, seq_len, hidden_size) embeddings.
            features: The audio features.
            mode: The host's.
            cache: The KV cache of the call, if it has one.
            cached: Whether the call continues what that cache holds.
        """
        call = self.call
        if call is None or features is None:
            return
        call.features = features
        if tokens is None:
            return
        call.prompt = Prompt(tokens, features, self.state, tokens.shape[1], _weak(cache))
        prompts = self._prompts[::-1]
        if mode == "all" and cached:
            call.continues = call.earlier = self._continued(prompts, cache)
        elif mode == "all":
            call.continues = next((p for p in prompts if _repeats(p, tokens, features, grown=True)), None)
        else:
            again = threading.get_ident() in self._rereading
            follows = functools.partial(_repeats, grown=False) if again else _decodes
            call.continues = next((p for p in prompts if follows(p, tokens, features)), None)
            call.repeated = call.continues is not None

    def _continued(self, prompts: list[Prompt], cache: object | None) -> Prompt | None:
        """The prompt, the latest first, whose utterance a call on this KV cache continues."""
        if not prompts:
            return None
        for prompt in prompts:
            if prompt.cache is not None and prompt.cache() is cache:
                return prompt
        if prompts[0].cache is not None and self._shared:
            raise SessionError(_INTERLEAVED.format(list(self.ids)))
        return prompts[0]

    def claim(self, call: Call) -> None:
        """The running call is about to read. Settles which state it reads, and that no other call writes meanwhile.

        Raises:
            SessionError: The block has been left, another forward of this session is about to write, or another
                utterance was written before this one was complete.
        """
        with self._lock:
            if self.closed:
                raise SessionError(
                    f"the block of session {list(self.ids)} was left while this forward ran, so its utterance is not "
                    "written; wait for the forward inside the block"
                )
            writes = self.write and not call.repeated
            if writes:
                other = self._writer
                if other is not None and other is not call and other.thread.is_alive():
                    raise SessionError(
                        f"a forward of session {list(self.ids)} is running in {other.thread.name!r}; one at a time, "
                        "since each utterance reads what the one before it wrote: wait for the first before you start "
                        "the second, or give each dialogue a block of its own"
                    )
                if call.continues is not None and call.continues is not self._prompts[-1]:
                    raise SessionError(_INTERLEAVED.format(list(self.ids)))
                self._writer = call
            call.state = self.state if call.continues is None else call.continues.before
            if call.prompt is not None:
                call.prompt.before = call.state

    def end(self, owner: object, *, succeeded: bool, keep_graph: bool) -> bool:
        """A forward of `owner` ended; commits what it wrote if it succeeded. Returns whether a write was skipped.

        Raises:
            SessionError: The block has been left since the forward began.
        """
        call = self.call
        if call is None or call.owner is not owner:
            return False
        del self._calls[threading.get_ident()]
        with self._lock:
            try:
                return succeeded and self._commit(call, keep_graph)
            finally:
                if self._writer is call:
                    self._writer = None

    def _commit(self, call: Call, keep_graph: bool) -> bool:
        if self.closed and call.pending is not None:
            raise SessionError(
                f"the block of session {list(self.ids)} was left while this forward ran, so its utterance is not "
                "written; wait for the forward inside the block"
            )
        if call.prompt is not None:
            self._remember(call, call.prompt)
        if call.pending is None:
            return False
        skipped = bool((call.pending.skipped_writes > self.state.skipped_writes).any())
        reached = call.pending.map(_not_inference)
        detached = reached.detach()
        self.state = reached if keep_graph else detached
        rows = [detached] if len(self.ids) == 1 else detached.split()
        self._states.keep({i: row for i, row in zip(self.ids, rows, strict=True) if i is not None})
        return skipped

    def _remember(self, call: Call, prompt: Prompt) -> None:
        if call.repeated and call.continues is not None:
            if threading.get_ident() not in self._rereading:
                call.continues.length = prompt.length
            return
        task = _running_task()
        self._shared = self._shared or (bool(self._prompts) and task != self._task)
        self._task = task
        others = [p for p in self._prompts if p is not call.continues]
        self._prompts = [*others, prompt][-_REMEMBERED if self._shared else -1 :]

    def close(self) -> None:
        """The block is left; waits for a commit that is under way. Forwards that still run write nothing any more."""
        with self._lock:
            self.closed = True
            self._prompts = []


_INTERLEAVED = (
    "session {}: another utterance was written before this one was complete, and what this one wrote since would be "
    "lost; let one generate() end before the next begins, or give each dialogue a block of its own"
)


def _running_task() -> object:
    """What the running code is a part of: its thread, and its asyncio task if it has one."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        task = None
    return threading.get_ident(), id(task)


def _weak(cache: object | None) -> "weakref.ref[Any] | None":
    try:
        return None if cache is None else weakref.ref(cache)
    except TypeError:  # a tuple, as caches of old were
        return None


def _decodes(last: Prompt, tokens: Shaped[Tensor, "batch seq_len ..."], features: Shaped[Tensor, "..."]) -> bool:
    """Whether this is the next step of a generate() without KV cache: the last prompt, and one token more than before.
    A chat that has grown by a question has more, and is an utterance of its own, in this block as in the next."""
    return tokens.shape[1] == last.length + 1 and _repeats(last, tokens, features, grown=False)


def _repeats(
    last: Prompt, tokens: Shaped[Tensor, "batch seq_len ..."], features: Shaped[Tensor, "..."], *, grown: bool
) -> bool:
    """Whether a longer prompt begins with an earlier one; its features are the same, or have `grown` too."""
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
