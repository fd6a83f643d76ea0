"""The audio positions of a batch, gathered row by row, and which rows are copies of one prompt."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from mal_adapter.errors import AudioMaskError, SessionError

__all__ = ["audio_rows", "check_audio_mask", "copies_per_prompt", "users_mask"]


def users_mask(
    mask: Bool[Tensor, "prompts prompt_len"],
    hidden: Float[Tensor, "batch seq_len hidden_size"],
    *,
    repeated: bool,
    text_only: bool,
) -> Bool[Tensor, "batch seq_len"] | None:
    """A session's own mask for a forward that it fits, or that repeats a prompt; None for text and decode steps.

    Args:
        mask: (prompts, prompt_len) bool, as given to the session.
        hidden: (batch, seq_len, hidden_size), a multiple of the prompts.
        repeated: Whether the forward repeats the prompt with tokens behind it.
        text_only: Whether the host's arguments say that there is no audio.

    Raises:
        AudioMaskError: The forward has another shape.
    """
    copies, rest = divmod(hidden.shape[0], mask.shape[0])
    grown = hidden.shape[1] - mask.shape[1]
    if rest == 0 and (grown == 0 or (grown > 0 and repeated)):
        mask = F.pad(mask.repeat_interleave(copies, dim=0), (0, grown))
        return mask if mask.any() else None
    if hidden.shape[1] == 1 or text_only:
        return None
    raise AudioMaskError(
        f"audio_mask is {tuple(mask.shape)}, but the hidden states are {tuple(hidden.shape)}; an utterance of another "
        "shape needs a session block with a mask of its own"
    )


def audio_rows(
    hidden: Float[Tensor, "batch seq_len hidden_size"], mask: Bool[Tensor, "batch seq_len"]
) -> tuple[Float[Tensor, "batch tokens hidden_size"], Bool[Tensor, "batch tokens"]]:
    """The hidden states at audio positions, (batch, most audio tokens, hidden_size), and which are no padding."""
    counts = mask.sum(dim=1)
    longest = int(counts.max())
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
    rows = hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1]))
    return rows, torch.arange(longest, device=hidden.device) < counts[:, None]


def copies_per_prompt(
    rows: Float[Tensor, "batch tokens hidden_size"],
    valid: Bool[Tensor, "batch tokens"],
    prompts: int,
    *,
    features: Shaped[Tensor, "rows ..."] | None,
    tokens: Shaped[Tensor, "batch seq_len ..."] | None,
) -> int:
    """How often generate() repeated each prompt, for beams or return sequences; 1 for a plain batch.

    Args:
        rows: (batch, audio tokens, hidden_size) hidden states at the audio positions.
        valid: (batch, audio tokens) bool, False at padding.
        prompts: How many prompts there should be, one per session id.
        features: The audio features, if they are known.
        tokens: The input ids or embeddings, if they should be equal within a prompt's copies.

    Raises:
        SessionError: The batch is no such repetition.
    """
    copies, rest = divmod(len(rows), prompts)
    if copies == 1 and rest == 0:
        return 1
    if copies and rest == 0 and _are_copies(valid, copies):
        if features is not None and len(features) == len(rows):
            # With one clip per prompt the features are exact; hidden states may not be, where an encoder samples.
            alike = _are_copies(features, copies) and (tokens is None or _are_copies(tokens, copies))
        else:
            # Copies go through the same GEMMs at other rows, so they may differ by rounding, and by no more.
            first = rows[::copies].repeat_interleave(copies, dim=0)
            distance, size = (torch.where(valid[..., None], t, 0).float().norm() for t in (rows - first, first))
            alike = bool(distance <= max(1e-4, 4 * torch.finfo(rows.dtype).eps) * size)
        if alike:
            return copies
    raise SessionError(
        f"the batch has {len(rows)} rows for {prompts} session ids, and they are not copies of {prompts} prompts. Pass "
        "one id per prompt: memory.session([id, ...]). With beams or num_return_sequences a prompt can hold only one "
        "clip, no longer than one row of features, since generate() repeats these rows and not the prompts"
    )


def _are_copies(rows: Shaped[Tensor, "batch ..."], copies: int) -> bool:
    """Whether each row equals the first of its group of `copies`."""
    return torch.equal(rows, rows[::copies].repeat_interleave(copies, dim=0))


def check_audio_mask(audio_mask: object, rows: int) -> None:
    """Raise `AudioMaskError` unless a user's mask is (rows, seq_len) bool."""
    if not isinstance(audio_mask, Tensor):
        given = type(audio_mask).__name__
    elif audio_mask.dtype != torch.bool or audio_mask.dim() != 2 or len(audio_mask) != rows:
        given = f"{audio_mask.dtype} {tuple(audio_mask.shape)}"
    else:
        return
    raise AudioMaskError(f"audio_mask is {given}, expected a bool tensor ({rows}, seq_len), one row per session id")
