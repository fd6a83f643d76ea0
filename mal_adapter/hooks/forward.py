"""`Forward`: one forward of the host while it runs."""

import dataclasses
import threading
import weakref
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from mal_adapter.memory.state import MemoryState

__all__ = ["Forward", "LastPrompt"]


@dataclasses.dataclass(eq=False)
class LastPrompt:
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
class Forward:
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
        utterance_so_far: The utterance's part that went before on the KV cache.
        pending: The state to commit when the forward has succeeded.
        in_checkpoint: Whether the hooked layer runs in a checkpoint, so that its hook is called after that.
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
    prompt: LastPrompt | None = None
    continues: LastPrompt | None = None
    utterance_so_far: LastPrompt | None = None
    pending: MemoryState | None = None
    in_checkpoint: bool = False
