"""Read one call of a host: its arguments, its audio features and its audio positions."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from mal_adapter.errors import AudioMaskError
from mal_adapter.hosts.spec import HostSpec

__all__ = ["bind_call", "find_audio_mask", "find_features", "is_cached"]


def bind_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module` by name, those in `**kwargs` included."""
    if not args:
        return kwargs
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind_partial(*args, **kwargs)
    except TypeError:
        return dict(kwargs)  # forward itself is about to raise, with its own message
    call = dict(bound.arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            call |= call.pop(parameter.name, {})
    return call


def find_features(host: HostSpec, call: Mapping[str, Any]) -> Shaped[Tensor, "rows ..."] | None:
    """The audio features of a call, or None for a call without audio; a list of clips as one row."""
    features = next((call[name] for name in host.feature_arguments or () if call.get(name) is not None), None)
    if isinstance(features, list | tuple):
        return torch.cat([clip.flatten() for clip in features])[None] if features else None
    return features


def is_cached(call: Mapping[str, Any]) -> bool:
    """Whether a call continues an earlier one on its KV cache."""
    cache = call.get("past_key_values")
    return cache is not None and bool(cache.get_seq_length() > 0)


def find_audio_mask(host: HostSpec, module: nn.Module, call: Mapping[str, Any]) -> Bool[Tensor, "batch seq_len"] | None:
    """Which positions of a call of `module` are audio: (batch, seq_len) bool, or None for a call without audio.

    Raises:
        AudioMaskError: The call has audio, but nothing says where.
    """
    if host.find_mask is not None:
        return host.find_mask(call)
    if find_features(host, call) is None:
        return None
    if host.audio_positions == "every":
        return _no_padding(call)
    if host.audio_token_id is None:
        raise AudioMaskError(
            "the host's config names no placeholder id for audio; pass host=HostSpec(audio_token_id=...) to "
            "attach_memory, or session(..., audio_mask=...)"
        )
    ids = call.get("input_ids")
    if ids is not None:
        return _with_audio(host, call, ids == host.audio_token_id)
    embeds = call.get("inputs_embeds")
    if embeds is None or not host.merges_embeds:
        raise AudioMaskError(
            "audio features came with inputs_embeds and without input_ids, so the audio positions are unknown; "
            "pass session(..., audio_mask=...) with a (batch, seq_len) bool mask"
        )
    placeholder = torch.tensor([host.audio_token_id], device=embeds.device)
    embedding = module.get_input_embeddings()(placeholder)  # type: ignore[operator]
    return _with_audio(host, call, (embeds == embedding.to(embeds)).all(-1))


def _with_audio(
    host: HostSpec, call: Mapping[str, Any], placeholders: Bool[Tensor, "batch seq_len"]
) -> Bool[Tensor, "batch seq_len"]:
    """The placeholders with audio behind them, (batch, seq_len) bool; a clip is an unbroken run of them."""
    counts = None if host.clip_tokens is None else host.clip_tokens(call)
    if counts is None:
        return placeholders
    starts = placeholders & ~F.pad(placeholders, (1, 0))[:, :-1]
    clip = starts.flatten().cumsum(0).view_as(starts) - 1
    if int(clip[-1, -1]) + 1 != len(counts):
        raise AudioMaskError(f"the prompt has places for {int(clip[-1, -1]) + 1} clips, and there are {len(counts)}")
    positions = torch.arange(placeholders.shape[1], device=placeholders.device)
    first = torch.where(starts, positions, 0).cummax(dim=1).values
    return placeholders & (positions - first < counts.to(clip.device)[clip.clamp_min(0)])


def _no_padding(call: Mapping[str, Any]) -> Bool[Tensor, "batch seq_len"]:
    """(batch, seq_len) bool, False at padding, as far as the attention mask says; generate() drops a mask of ones."""
    tokens = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
    batch, seq_len = tokens.shape[:2]
    attention_mask = call.get("attention_mask")
    if attention_mask is None:
        return torch.ones(batch, seq_len, dtype=torch.bool, device=tokens.device)
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return attention_mask[:, -seq_len:].bool()
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 4:
        # A static cache's, (batch, 1, seq_len, cache length), bool or to be added: padding does not attend to itself.
        cache = call.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        itself = attention_mask[:, 0].diagonal(past, dim1=1, dim2=2)
        return (itself if itself.dtype == torch.bool else itself == 0).expand(batch, -1)
    raise AudioMaskError(
        f"the attention mask is a {type(attention_mask).__name__}, so the padding of this batch is unknown; generate "
        "without a static cache"
    )
