"""`Session`: the dialogues of one `with memory.session(...)` block."""

import asyncio
import functools
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from mal_adapter.errors import CopyError, SessionError
from mal_adapter.hooks.forward import Forward, LastPrompt
from mal_adapter.hooks.skipped import SkippedWrites
from mal_adapter.memory.adapter import MemoryAdapter
from mal_adapter.memory.ensemble import AnyAdapter
from mal_adapter.memory.state import MemoryState
from mal_adapter.stores.base import encode_session_id
from mal_adapter.stores.states import SessionStates

__all__ = ["Session", "check_session_ids"]

# How many utterances of a block are remembered once several tasks or threads have used it; before that, the last one.
_REMEMBERED = 8


class Session:
    """The dialogues of one `with memory.session(...)` block; row i of a batch belongs to `ids[i]`.

    Tasks and threads that share the block may run forwards in it at once, as long as only one of them writes.

    Attributes:
        ids: Session ids; None for an anonymous dialogue.
        state: What has been written so far, one row per id. While the adapter is in training mode it carries the
            autograd graph through the block.
        write: Whether utterances are written, or only read.
        audio_mask: The user's mask, which wins over detection; may be set between forwards.
        adapter: Whose state it is.
        skipped: What is known of writes that were skipped.
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
        adapter: AnyAdapter,
    ) -> None:
        self.ids = ids
        self.state = state
        self.write = write
        self.audio_mask = audio_mask
        self.adapter = adapter
        self.skipped = SkippedWrites()
        self.used = False
        self.closed = False
        self._states = states
        self._mask_on_host: tuple[Tensor, Tensor] | None = None  # the user's, and its copy
        self._forwards: dict[int, Forward] = {}  # by the thread that runs them
        self._writer: Forward | None = None
        self._prompts: list[LastPrompt] = []  # the last one at the end
        self._task: object = None  # that fed it
        self._shared = False
        self._rereading: set[int] = set()  # the threads that do
        self._lock = threading.Lock()  # of what several threads change: ids, writer, state and prompts

    @property
    def forward(self) -> Forward | None:
        """The forward that this thread is running."""
        return self._forwards.get(threading.get_ident())

    @property
    def reader(self) -> MemoryAdapter:
        """The adapter that a forward reads and writes with.

        Raises:
            SessionError: There are several, and a forward has the answer of one.
        """
        if isinstance(self.adapter, MemoryAdapter):
            return self.adapter
        raise SessionError(_SEVERAL.format(len(self.adapter.members)))

    def mask_on_host(self, mask: Bool[Tensor, "prompts seq_len"]) -> Bool[Tensor, "prompts seq_len"]:
        """`audio_mask` on the CPU, copied from its device once."""
        if self._mask_on_host is None or self._mask_on_host[0] is not mask:
            self._mask_on_host = mask, mask.cpu()
        return self._mask_on_host[1]

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
            raise SessionError(
                f"a session of {list(self.ids)} can't continue with {list(ids)}; give some of its own ids"
            )
        rows = torch.tensor([self.ids.index(i) for i in ids])
        with self._lock:
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
        """A forward of `module` starts. The outermost one counts; one that an interrupt left behind is dropped."""
        self.used = True
        forward = self.forward
        if forward is None or module in forward.entered:
            if forward is not None and forward is self._writer:
                self._writer = None
            forward = self._forwards[threading.get_ident()] = Forward(module, self.state)
        forward.enter(module)

    def see_prompt(
        self,
        tokens: Shaped[Tensor, "batch seq_len ..."] | None,
        features: Shaped[Tensor, "..."] | None,
        *,
        audio_positions: str | None,
        cache: object | None,
        cached: bool,
    ) -> None:
        """The running forward has audio. If it repeats the prompt of a generate() without KV cache, it reads the state
        from before that prompt and writes nothing. Where every position takes audio, generated tokens are audio too:
        the utterance is read and written again, as a whole.

        Args:
            tokens: (batch, seq_len) ids or (batch, seq_len, hidden_size) embeddings.
            features: The audio features.
            audio_positions: The host's.
            cache: The KV cache of the forward, if it has one.
            cached: Whether the forward continues what that cache holds.

        Raises:
            SessionError: Several tasks or threads fed this session, and it is not known whose utterance continues.
        """
        forward = self.forward
        if forward is None or features is None:
            return
        forward.see_features(features)
        if tokens is None:
            return
        prompt = LastPrompt(tokens, features, self.state, tokens.shape[1], _weak(cache))
        prompts = self._prompts[::-1]
        if audio_positions == "every" and cached:
            forward.continue_utterance(prompt, self._continued(prompts, cache), cached=True)
        elif audio_positions == "every":
            earlier = next((p for p in prompts if _repeats(p, tokens, features, grown=True)), None)
            forward.continue_utterance(prompt, earlier, cached=False)
        else:
            again = threading.get_ident() in self._rereading
            follows = functools.partial(_repeats, grown=False) if again else _decodes
            forward.repeat(prompt, next((p for p in prompts if follows(p, tokens, features)), None))

    def _continued(self, prompts: list[LastPrompt], cache: object | None) -> LastPrompt | None:
        """The prompt whose utterance a forward on this KV cache continues; `prompts` are the latest first."""
        if not prompts:
            return None
        for prompt in prompts:
            if prompt.cache is not None and prompt.cache() is cache:
                return prompt
        if prompts[0].cache is not None and self._shared:
            raise SessionError(_INTERLEAVED.format(list(self.ids)))
        return prompts[0]

    def claim(self, forward: Forward) -> None:
        """The running forward is about to read. Settles which state it reads, and that no other one writes meanwhile.

        Raises:
            SessionError: The block has been left, another forward of this session is about to write, or another
                utterance was written before this one was complete.
        """
        with self._lock:
            if self.closed:
                raise SessionError(_LEFT.format(list(self.ids)))
            earlier = forward.continues
            if self.write and not forward.repeated:
                other = self._writer
                if other is not None and other is not forward and other.thread.is_alive():
                    raise SessionError(
                        f"a forward of session {list(self.ids)} is running in {other.thread.name!r}; one at a time, "
                        "since each utterance reads what the one before it wrote: wait for the first before you start "
                        "the second, or give each dialogue a block of its own"
                    )
                if earlier is not None and self._prompts[-1:] != [earlier]:
                    raise SessionError(_INTERLEAVED.format(list(self.ids)))
                self._writer = forward
            forward.read_from(self.state if earlier is None else earlier.before)

    def end(self, owner: object, *, succeeded: bool, keep_graph: bool) -> None:
        """A forward of `owner` ended; commits what it wrote if it succeeded. Does not wait for the device, unless the
        store does, since it takes bytes.

        Raises:
            SessionError: The block has been left since the forward began.
            SessionConflictError: Another process has continued one of the dialogues.
            StoreError: The store can't be reached, and this process has no room for a state.
        """
        forward = self.forward
        if forward is None or forward.owner is not owner:
            return
        del self._forwards[threading.get_ident()]
        with self._lock:
            try:
                if succeeded:
                    self._commit(forward, keep_graph)
            finally:
                if self._writer is forward:
                    self._writer = None

    def abandon(self) -> None:
        """This thread's forward has failed, and nobody will say that it ended."""
        forward = self._forwards.pop(threading.get_ident(), None)
        with self._lock:
            if forward is not None and self._writer is forward:
                self._writer = None

    def _commit(self, forward: Forward, keep_graph: bool) -> None:
        if self.closed and forward.pending is not None:
            raise SessionError(_LEFT.format(list(self.ids)))
        if forward.prompt is not None:
            self._remember(forward, forward.prompt)
        if forward.pending is not None:
            self._reach(forward.pending, keep_graph)

    def advance(self, state: MemoryState) -> None:
        """Commit a state that forwards of other sessions have reached from this one's; see `AttachedMemory.by_member`.

        Raises:
            SessionError: The block has been left.
            SessionConflictError, StoreError: As `end`.
        """
        with self._lock:
            if self.closed:
                raise SessionError(_LEFT.format(list(self.ids)))
            self._reach(state, keep_graph=False)

    def write_answers(self, probabilities: Float[Tensor, "batch labels"]) -> None:
        """The host's answers to the utterances that this block has written last; see `MemoryAdapter.write_answers`.

        Raises:
            SessionError: The block has been left.
            SessionConflictError, StoreError: As `end`.
        """
        if not self.write:
            return
        adapter = self.reader
        state = adapter.write_answers(self.state, probabilities)
        if state is not self.state:
            with self._lock:
                if self.closed:
                    raise SessionError(_LEFT.format(list(self.ids)))
                self._reach(state, keep_graph=adapter.training)

    def _reach(self, state: MemoryState, keep_graph: bool) -> None:
        reached = state.map(_not_inference)
        detached = reached.detach()
        before, self.state = self.state, reached if keep_graph else detached
        self.skipped.note(before.skipped_writes, self.state.skipped_writes)
        rows = [detached] if len(self.ids) == 1 else detached.split()
        self._states.keep({i: row for i, row in zip(self.ids, rows, strict=True) if i is not None})

    def _remember(self, forward: Forward, prompt: LastPrompt) -> None:
        if forward.repeated and forward.continues is not None:
            if threading.get_ident() not in self._rereading:
                forward.continues.length = prompt.length
            return
        task = _running_task()
        self._shared = self._shared or (bool(self._prompts) and task != self._task)
        self._task = task
        others = [p for p in self._prompts if p is not forward.continues]
        self._prompts = [*others, prompt][-_REMEMBERED if self._shared else -1 :]

    def close(self) -> None:
        """The block is left; waits for a commit that is under way. Forwards that still run write nothing."""
        with self._lock:
            self.closed = True
            self._prompts = []


_SEVERAL = (
    "this adapter has {} members, and one forward of the host has the answer of one member. "
    "EmotionRecognizer(model, processor, memory) averages their answers; to call the model yourself, attach one of "
    "them: attach_memory(model, adapter=memory.adapter.members[0])"
)

_LEFT = (
    "the block of session {} was left while this forward ran, so its utterance is not written; wait for the forward "
    "inside the block"
)

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


def _decodes(last: LastPrompt, tokens: Shaped[Tensor, "batch seq_len ..."], features: Shaped[Tensor, "..."]) -> bool:
    """Whether this is the next step of a generate() without KV cache: the last prompt, and one token more than before.
    A chat that has grown by a question has more, and is an utterance of its own, in this block as in the next."""
    return tokens.shape[1] == last.length + 1 and _repeats(last, tokens, features, grown=False)


def _repeats(
    last: LastPrompt, tokens: Shaped[Tensor, "batch seq_len ..."], features: Shaped[Tensor, "..."], *, grown: bool
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


def check_session_ids(session_id: str | Sequence[str]) -> list[str]:
    """The ids of one session, one per prompt of the batch.

    Raises:
        SessionError: There is none, they have no order, or one is repeated or not a non-empty string.
    """
    several = not isinstance(session_id, str) and isinstance(session_id, Iterable)
    if isinstance(session_id, set | frozenset):
        raise SessionError(f"session ids {session_id!r} have no order; give them in the order of the batch's rows")
    ids = list(session_id) if several else [session_id]
    if not ids or None in ids:
        raise SessionError(f"session ids {session_id!r}: expected one id, a sequence of one id per prompt, or None")
    for i in ids:
        encode_session_id(i)  # raises for another type
    if len(set(ids)) < len(ids):
        raise SessionError(f"session ids {ids} are not distinct; each row needs a dialogue of its own")
    return ids  # type: ignore[return-value]
