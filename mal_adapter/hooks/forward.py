"""`Forward`: one forward of the host while it runs, and the prompt that it was given."""

import dataclasses
import itertools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from mal_adapter.hooks.plan import Plan
from mal_adapter.memory.spans import Spans
from mal_adapter.memory.state import MemoryState

__all__ = ["Forward", "LastPrompt"]


@dataclasses.dataclass(eq=False)
class LastPrompt:
    """What a forward was given: to recognise a generate() without KV cache, which feeds it again at each step, and to
    complete an utterance that continues while the host answers.

    Attributes:
        tokens: (batch, seq_len) input ids, or (batch, seq_len, hidden_size) input embeddings.
        features: The audio features.
        before: The state before this utterance.
        length: How many tokens were given last: the prompt's, and those that were generated since.
        cache: A weak reference to the KV cache that was filled, where it is known.
        audio: (audio tokens of all rows, hidden_size) output of the hooked layer at the audio positions; None unless
            the utterance can continue.
        spans: Where each row's tokens are in `audio`; None where that is.
    """

    tokens: Shaped[Tensor, "batch seq_len ..."]
    features: Shaped[Tensor, "..."]
    before: MemoryState
    length: int
    cache: "weakref.ref[Any] | None" = None
    audio: Float[Tensor, "tokens hidden_size"] | None = None
    spans: Spans | None = None


class Forward:
    """One top-level forward of the host, while it runs. Others read its attributes; only its methods change them.

    Args:
        owner: The module whose hooks began it; only its end commits.
        state: The state of its session when it began.

    Attributes:
        state: The state that it reads.
        thread: The thread that runs it.
        entered: The hooked modules that it has entered.
        records_grad: Whether autograd recorded when it began.
        mask: (batch, seq_len) bool audio positions; None for a forward without audio.
        plan: Where the audio is in the hidden states; None for a forward without audio, and where only the hidden
            states have the shape of the session's own mask.
        text_only: Whether the host's own arguments say that there is no audio.
        features: The audio features, if there are any.
        prompt: What it was given, to be remembered if it succeeds.
        continues: The earlier prompt that it repeats, or whose utterance it continues.
        repeated: Whether it repeats that prompt, so that nothing is written.
        pending: The state to commit when it has succeeded.
        in_checkpoint: Whether the hooked layer runs in a checkpoint, so that its hook runs after that.
    """

    def __init__(self, owner: object, state: MemoryState) -> None:
        self.owner = owner
        self.state = state
        self.thread = threading.current_thread()
        self.entered: list[object] = []
        self.records_grad = torch.is_grad_enabled()
        self.mask: Bool[Tensor, "batch seq_len"] | None = None
        self.plan: Plan | None = None
        self.text_only = False
        self.features: Shaped[Tensor, ...] | None = None
        self.prompt: LastPrompt | None = None
        self.continues: LastPrompt | None = None
        self.repeated = False
        self.pending: MemoryState | None = None
        self.in_checkpoint = False
        self._so_far: LastPrompt | None = None  # the part of the utterance that is on the KV cache

    def enter(self, module: object) -> None:
        """A hooked module runs in it."""
        self.entered.append(module)

    def see_audio(self, mask: Bool[Tensor, "batch seq_len"]) -> None:
        """The host's arguments have audio at these positions."""
        self.mask = mask

    def see_plan(self, plan: Plan | None) -> None:
        """Its audio is there in the hidden states."""
        self.plan = plan

    def see_text_only(self, text_only: bool) -> None:
        """Whether the host's arguments say that there is no audio, for a session with a mask of its own."""
        self.text_only = text_only

    def see_features(self, features: Shaped[Tensor, "..."]) -> None:
        """The audio features of the arguments."""
        self.features = features

    def repeat(self, prompt: LastPrompt, earlier: LastPrompt | None) -> None:
        """`prompt` is given; it repeats `earlier` with tokens behind it, unless that is None."""
        self.prompt, self.continues, self.repeated = prompt, earlier, earlier is not None

    def continue_utterance(self, prompt: LastPrompt, earlier: LastPrompt | None, *, cached: bool) -> None:
        """`prompt` is given, and completes the utterance of `earlier`: as a whole, or as its end on the KV cache."""
        self.prompt, self.continues = prompt, earlier
        self._so_far = earlier if cached else None

    def read_from(self, state: MemoryState) -> None:
        """This is the state before its utterance."""
        self.state = state
        if self.prompt is not None:
            self.prompt.before = state

    def whole_utterance(
        self, tokens: Float[Tensor, "tokens hidden_size"], spans: Spans
    ) -> tuple[Float[Tensor, "all_tokens hidden_size"], Spans]:
        """`tokens` and `spans`, each row behind its part of the utterance that is on the KV cache."""
        so_far = self._so_far
        if so_far is None or so_far.audio is None or so_far.spans is None:
            return tokens, spans
        earlier, new = so_far.spans.lengths, spans.lengths
        pieces = zip(torch.split(so_far.audio, list(earlier)), torch.split(tokens, list(new)), strict=True)
        lengths = [sum(pair) for pair in zip(earlier, new, strict=True)]
        return torch.cat(list(itertools.chain(*pieces))), Spans(lengths, tokens.device)

    def may_continue(self, tokens: Float[Tensor, "tokens hidden_size"], spans: Spans) -> None:
        """Its utterance is `tokens` so far; a later forward may continue it."""
        if self.prompt is not None:
            self.prompt.audio, self.prompt.spans = tokens, spans

    def prepare_write(self, state: MemoryState) -> None:
        """`state` is to be committed if the forward succeeds."""
        self.pending = state

    @contextmanager
    def checkpointing(self) -> Iterator[None]:
        """Within this block the hooked layer runs in a checkpoint."""
        self.in_checkpoint = True
        try:
            yield
        finally:
            self.in_checkpoint = False
