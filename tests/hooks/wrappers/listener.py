"""Host and adapter in one module, for whatever trains a module: DDP, HF Trainer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mal_adapter import AttachedMemory
from tests.hooks.wrappers.dialogue import Turn

__all__ = ["Listener"]


class Listener(nn.Module):
    """A forward hears a batch of whole dialogues, so that gradients reach from utterance to utterance.

    Args:
        host: The model that `memory` is attached to, or a function that calls it, which is no submodule.
        memory: Its adapter becomes a submodule.
    """

    def __init__(self, host: Callable[..., Any], memory: AttachedMemory) -> None:
        super().__init__()
        self.host = host
        self.memory = memory
        self.adapter = memory.adapter

    def forward(self, turns: Sequence[Turn], labels: Tensor) -> Tensor:
        """The mean cross-entropy of the token after each utterance; labels are (batch, utterances)."""
        self.memory.states.clear()
        with self.memory.session([str(row) for row in range(len(labels))]):
            logits = [self.host(**turn, use_cache=False).logits[:, -1] for turn in turns]
        return F.cross_entropy(torch.stack(logits, dim=1).flatten(0, 1), labels.flatten())
