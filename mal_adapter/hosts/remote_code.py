"""Where hosts of remote code put their audio. Each family's calls say it in another way, so each has a function here.

Read from the checkpoints' own code. None of it is copied or run; a function sees a call's arguments and nothing else.

SALMONN has no function: the model is a plain module without config, and only embeddings reach its language model.
Attach to that, `attach_memory(salmonn.llama_model, ...)`, and pass a user's mask: True at the speech tokens, which
follow the one start token and the prompt's tokens before `<SpeechHere>`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mal_adapter.errors import AudioMaskError
from mal_adapter.hosts.spec import HostSpec

__all__ = ["REMOTE", "desta25_mask", "kimi_audio_mask", "step_audio_2_mask", "ultravox_mask"]

STEP_AUDIO_START_ID = 151688
"""`<audio_start>`, a number in Step-Audio 2's own code."""

DESTA_PROMPT_SIZE = 64
"""`config.prompt_size` of the released DeSTA2.5-Audio."""


def ultravox_mask(call: Mapping[str, Any]) -> Bool[Tensor, "batch seq_len"] | None:
    """Ultravox: clip i has `audio_token_len[i]` positions from `audio_token_start_idx[i]` on.

    Both are (clips,). `audio_batch_size`, (rows,) or (rows, 1), is the number of clips of each row; up to version 0.4
    there is none, and clip i is row i's. Positions count left padding, and from where the KV cache ends.

    Raises:
        AudioMaskError: A span leaves the sequence, or there are none: a version of Ultravox inserts the clips into the
            sequence in its forward.

    Example:
        >>> clips = {"audio_values": torch.zeros(3, 80, 16), "audio_token_start_idx": torch.tensor([1, 0, 3])}
        >>> clips |= {"audio_token_len": torch.tensor([2, 1, 2]), "audio_batch_size": torch.tensor([1, 2])}
        >>> ultravox_mask({"input_ids": torch.zeros(2, 5), **clips}).int()
        tensor([[0, 1, 1, 0, 0],
                [1, 0, 0, 1, 1]], dtype=torch.int32)
    """
    clips = call.get("audio_values")
    if clips is None or len(clips) == 0:
        return None
    start, length = call.get("audio_token_start_idx"), call.get("audio_token_len")
    if start is None or length is None:
        raise AudioMaskError(
            "audio_values came without audio_token_start_idx and audio_token_len, so this Ultravox inserts the audio "
            "itself; pass session(..., audio_mask=...) for the longer sequence"
        )
    clips_per_row = call.get("audio_batch_size")
    clips_per_row = torch.ones_like(start) if clips_per_row is None else clips_per_row.flatten().to(start.device)
    row = torch.arange(len(clips_per_row), device=start.device).repeat_interleave(clips_per_row)
    return _spans(call, row, start, length)


def kimi_audio_mask(call: Mapping[str, Any]) -> Bool[Tensor, "batch seq_len"] | None:
    """Kimi-Audio: `is_continuous_mask` (1, seq_len) bool is the mask, None at decode steps.

    Example:
        >>> kimi_audio_mask({"is_continuous_mask": torch.tensor([[False, True, True]])})
        tensor([[False,  True,  True]])
    """
    mask = call.get("is_continuous_mask")
    return None if mask is None else mask.bool()


def step_audio_2_mask(call: Mapping[str, Any]) -> Bool[Tensor, "batch seq_len"] | None:
    """Step-Audio 2: the clips follow the `<audio_start>` ids in reading order, row by row.

    `wav_lens` (clips,) are mel frames, and about eight of them make a token. There is no KV cache: each step of
    generate(), which takes audio only with `use_cache=False`, feeds all ids and clips again.

    Raises:
        AudioMaskError: A clip leaves the sequence, or there is not one `<audio_start>` per clip.

    Example:
        >>> ids = torch.tensor([[7, 151688, 9, 9, 8]])
        >>> step_audio_2_mask({"input_ids": ids, "wavs": torch.zeros(1, 128, 16), "wav_lens": torch.tensor([16])}).int()
        tensor([[0, 0, 1, 1, 0]], dtype=torch.int32)
    """
    if call.get("wavs") is None:
        return None
    row, start = (call["input_ids"] == STEP_AUDIO_START_ID).nonzero(as_tuple=True)
    encoded = (call["wav_lens"] + 1) // 2 // 2  # a convolution and a pooling, each of stride 2
    length = (encoded - 1) // 2 + 1  # the adapter's convolution, of stride 2 and padded
    return _spans(call, row, start + 1, length)


def desta25_mask(call: Mapping[str, Any], prompt_size: int = DESTA_PROMPT_SIZE) -> Bool[Tensor, "batch seq_len"] | None:
    """DeSTA2.5: `batch_start_positions`, a list of (row, start) per clip, each with `prompt_size` audio tokens.

    The clip's transcript follows them under the same placeholder id and is no audio. Positions count left padding.
    Its `generate` calls the language model alone, with embeddings: attach to `model.llm_model` there, and give the
    session the mask that this function makes of the prompt's ids and positions.

    Args:
        call: The arguments of `forward`.
        prompt_size: `config.prompt_size`; give another with `functools.partial` in a `HostSpec`.

    Raises:
        AudioMaskError: A span leaves the sequence.

    Example:
        >>> call = {"input_ids": torch.zeros(2, 6), "batch_start_positions": [(0, 1), (1, torch.tensor(4))]}
        >>> desta25_mask(call, prompt_size=2).int()
        tensor([[0, 1, 1, 0, 0, 0],
                [0, 0, 0, 0, 1, 1]], dtype=torch.int32)
    """
    positions = call.get("batch_start_positions")
    if positions is None or len(positions) == 0:
        return None
    row, start = torch.tensor([(int(row), int(start)) for row, start in positions]).unbind(1)
    return _spans(call, row, start, torch.full_like(start, prompt_size))


def _spans(
    call: Mapping[str, Any], row: Int[Tensor, " spans"], start: Int[Tensor, " spans"], length: Int[Tensor, " spans"]
) -> Bool[Tensor, "batch seq_len"]:
    """(batch, seq_len) bool, True at `length[i]` positions of `row[i]` from `start[i]` on; each (spans,)."""
    tokens = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
    batch, seq_len = tokens.shape[:2]
    row, start, length = (t.to(tokens.device).long() for t in (row, start, length))
    if not len(row) == len(start) == len(length):
        raise AudioMaskError(f"the prompt has places for {len(row)} clips, and there are {len(length)}")
    outside = (row < 0) | (row >= batch) | (start < 0) | (start + length > seq_len)
    if outside.any():
        spans = [f"row {r}, {s} … {s + n}" for r, s, n in torch.stack((row, start, length), 1)[outside].tolist()]
        raise AudioMaskError(f"audio spans leave the (batch, seq_len) {(batch, seq_len)}: {'; '.join(spans)}")
    positions = torch.arange(seq_len, device=tokens.device)
    inside = (positions >= start[:, None]) & (positions < (start + length)[:, None])
    return torch.zeros(batch, seq_len, dtype=torch.long, device=tokens.device).index_add_(0, row, inside.long()) > 0


REMOTE: dict[str, HostSpec] = {
    "ultravox": HostSpec(find_mask=ultravox_mask),
    "kimi_audio": HostSpec(feature_arguments=("whisper_input_feature",), find_mask=kimi_audio_mask),
    "step_audio_2": HostSpec(feature_arguments=("wavs",), find_mask=step_audio_2_mask),
    "desta25": HostSpec(layers="llm_model.model.layers", feature_arguments=("batch_features",), find_mask=desta25_mask),
}
"""Keys are `config.model_type`; detection finds the fields that are None."""
