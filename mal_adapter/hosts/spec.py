"""`HostSpec`: a host described as data."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxtyping import Bool, Int
from torch import Tensor

__all__ = ["HostSpec"]


@dataclasses.dataclass(frozen=True)
class HostSpec:
    """Where the decoder layers are and how audio positions are found; None means that it is detected.

    Args:
        layers: Dotted path of the `ModuleList` of decoder layers, from the model without its PEFT or compile wrapper.
        hidden_size: Width of the hidden states between those layers.
        audio_token_id: The placeholder id at each audio position of `input_ids`.
        mask_module: Dotted path of the module whose call carries `input_ids` and the audio features; "" is the model.
        feature_arguments: Names of that call's audio features. Only a call that has one of them carries audio.
        find_mask: Replaces the comparison with `audio_token_id`: called with the call's arguments by name, it
            returns a (batch, seq_len) bool mask, or None for a call without audio. A module-level function, so that
            the model can be pickled. From a compiled graph it gets the tensors of the call alone.
        clip_tokens: For a host whose clips all take the same number of placeholders, however short they are: called
            with a call's arguments by name, it returns how many of each clip's have audio behind them, (clips,) int,
            or None for all.
        audio_positions: "placeholder", or "every" for a host that adds audio to every position, those of decode steps
            included. There the prefill and the steps on its KV cache are one utterance, which each step completes.
        merges_embeds: Whether a call with `inputs_embeds` and features, but without ids, merges the features in where
            the placeholder's embedding is.
        stream_idx: Where a layer's hidden states are (streams, batch, seq_len, hidden_size), the one that is read and
            written.

    A host without ids at all, such as a plain `nn.Module`, needs only `layers` and `hidden_size`; pass the mask to
    `AttachedMemory.session(audio_mask=...)`.

    Example:
        >>> spec = HostSpec(layers="blocks", hidden_size=8)
        >>> spec.audio_token_id is None
        True
    """

    layers: str | None = None
    hidden_size: int | None = None
    audio_token_id: int | None = None
    mask_module: str | None = None
    feature_arguments: tuple[str, ...] | None = None
    find_mask: Callable[[Mapping[str, Any]], Bool[Tensor, "batch seq_len"] | None] | None = None
    clip_tokens: Callable[[Mapping[str, Any]], Int[Tensor, " clips"] | None] | None = None
    audio_positions: Literal["placeholder", "every"] | None = None
    merges_embeds: bool | None = None
    stream_idx: int | None = None
