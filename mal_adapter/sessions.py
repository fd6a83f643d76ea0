"""Whose memory is meant: the session that is open, and the forward that runs in it."""

import dataclasses
from collections.abc import Sequence
from typing import NoReturn

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from mal_adapter.errors import CopyError, SessionError
from mal_adapter.session_states import SessionStates
from mal_adapter.state import MemoryState

__all__ = ["Call", "Prompt", "Session"]


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

    def __getstate__(self) -> NoReturn:
        raise CopyError(
            "an open session is one block in one process and can't be pickled or deep-copied; a state can: "
            "memory.states[id]. In another process call attach_memory, and open the session by its id there"
        )

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
