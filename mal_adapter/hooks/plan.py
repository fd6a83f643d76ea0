"""`Plan`: which hidden states of a forward are audio, and which rows are copies of one prompt.

All of it is decided from the arguments of a forward, before the device has work to do. The hooked layer, whose work is
queued behind that of half the host, then waits for no number.
"""

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from mal_adapter.errors import AudioMaskError, SessionError
from mal_adapter.memory.spans import Spans
from mal_adapter.memory.transfer import to_device

__all__ = [
    "Plan",
    "check_audio_mask",
    "check_copies",
    "copies_per_prompt",
    "fit_users_mask",
    "plan_audio",
    "repeat_users_mask",
]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Where the audio of one forward is.

    Attributes:
        shape: (batch, seq_len) of the hidden states.
        index: The audio positions in the flattened hidden states, row by row.
        spans: How many of them each row has.
        copies: How many rows each prompt has; None if only the hidden states can show that they are copies.
    """

    shape: tuple[int, int]
    index: Int64[Tensor, " tokens"]
    spans: Spans
    copies: int | None = 1

    def to(self, device: torch.device) -> "Plan":
        """The plan for hidden states on `device`."""
        if self.index.device == device:
            return self
        return dataclasses.replace(self, index=to_device(self.index, device), spans=Spans(self.spans.lengths, device))

    def gather(self, hidden: Float[Tensor, "batch seq_len hidden_size"]) -> Float[Tensor, "tokens hidden_size"]:
        """The hidden states at audio positions."""
        return hidden.flatten(0, 1).index_select(0, self.index)

    def scatter(
        self, hidden: Float[Tensor, "batch seq_len hidden_size"], tokens: Float[Tensor, "tokens hidden_size"]
    ) -> Float[Tensor, "batch seq_len hidden_size"]:
        """A copy of `hidden` with `tokens` at audio positions; everything else keeps its bits."""
        return hidden.flatten(0, 1).index_copy(0, self.index, tokens).view(hidden.shape)


def plan_audio(mask: Bool[Tensor, "batch seq_len"], device: torch.device) -> Plan | None:
    """Where the audio of hidden states on `device` is, by a mask on the host; None if there is none.

    Example:
        >>> plan = plan_audio(torch.tensor([[False, True, True], [True, False, False]]), torch.device("cpu"))
        >>> plan.index.tolist(), plan.spans.lengths
        ([1, 2, 3], (2, 1))
    """
    index = mask.flatten().nonzero().squeeze(1)
    if len(index) == 0:
        return None
    batch, seq_len = mask.shape
    spans = Spans(mask.sum(1).tolist(), mask.device)
    return Plan((batch, seq_len), index, spans).to(device)


def fit_users_mask(
    mask: tuple[int, int], hidden: tuple[int, int], *, repeated: bool, text_only: bool
) -> tuple[int, int] | None:
    """How a session's own mask fits a forward: how often each row is repeated, and how many positions follow it. None
    for text and decode steps.

    Args:
        mask: (prompts, prompt_len), the shape of the mask.
        hidden: (batch, seq_len) of the hidden states.
        repeated: Whether the forward repeats the prompt with tokens behind it.
        text_only: Whether the host's arguments say that there is no audio.

    Raises:
        AudioMaskError: The forward has another shape.

    Example:
        >>> fit_users_mask((2, 7), (6, 9), repeated=True, text_only=False)
        (3, 2)
    """
    copies, rest = divmod(hidden[0], mask[0])
    grown = hidden[1] - mask[1]
    if rest == 0 and (grown == 0 or (grown > 0 and repeated)):
        return copies, grown
    if hidden[1] == 1 or text_only:
        return None
    raise AudioMaskError(
        f"audio_mask is {mask}, but the hidden states are {hidden}; an utterance of another shape needs a session "
        "block with a mask of its own"
    )


def repeat_users_mask(
    mask: Bool[Tensor, "prompts prompt_len"], copies: int, grown: int
) -> Bool[Tensor, "batch seq_len"]:
    """A session's own mask for a forward with `copies` rows per prompt and `grown` further positions."""
    return F.pad(mask.repeat_interleave(copies, dim=0), (0, grown))


def copies_per_prompt(
    lengths: Sequence[int],
    prompts: int,
    *,
    features: Shaped[Tensor, "rows ..."] | None,
    tokens: Shaped[Tensor, "batch seq_len ..."] | None,
    embeds: Float[Tensor, "batch seq_len hidden_size"] | None = None,
) -> int | None:
    """How often generate() repeated each prompt, for beams or return sequences; 1 for a plain batch.

    Args:
        lengths: Audio tokens per row of the batch.
        prompts: How many prompts there should be, one per session id.
        features: The audio features, if they are known.
        tokens: The input ids or embeddings, if they should be equal within a prompt's copies.
        embeds: The input embeddings of a call without ids and features, which hold the audio.

    Returns:
        None if only the hidden states can show that the rows are copies, see `check_copies`: a prompt of several clips,
        or features that are not known.

    Raises:
        SessionError: The batch is no such repetition.
    """
    copies, rest = divmod(len(lengths), prompts)
    if copies == 1 and rest == 0:
        return 1
    if copies and rest == 0 and list(lengths) == [lengths[i - i % copies] for i in range(len(lengths))]:
        if features is None or len(features) != len(lengths):
            return copies if features is None and embeds is not None and _are_copies(embeds, copies) else None
        # With one clip per prompt the features are exact; hidden states may not be, where an encoder samples.
        if _are_copies(features, copies) and (tokens is None or _are_copies(tokens, copies)):
            return copies
    raise _no_copies(len(lengths), prompts)


def check_copies(tokens: Float[Tensor, "tokens hidden_size"], spans: Spans, prompts: int) -> int:
    """How many rows each prompt has, seen in the hidden states at the audio positions. Waits for the device.

    Raises:
        SessionError: The rows of a prompt differ by more than rounding.
    """
    copies = len(spans) // prompts
    rows = torch.split(tokens, list(spans.lengths))
    first = torch.cat([rows[i - i % copies] for i in range(len(rows))])
    # Copies go through the same GEMMs at other rows, so they may differ by rounding, and by no more.
    distance, size = (t.float().norm() for t in (tokens - first, first))
    if bool(distance <= max(1e-4, 4 * torch.finfo(tokens.dtype).eps) * size):
        return copies
    raise _no_copies(len(spans), prompts)


def _no_copies(rows: int, prompts: int) -> SessionError:
    return SessionError(
        f"the batch has {rows} rows for {prompts} session ids, and they are not copies of {prompts} prompts. Pass "
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
