"""The layers of a host up to the memory's: run once, then left out in other forwards of the same prompts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mal_adapter.errors import HostError
from mal_adapter.hooks.session import Session

if TYPE_CHECKING:
    from mal_adapter.attach import AttachedMemory

__all__ = ["Captured", "LowerLayers", "SkippingError", "check_scores"]


# Largest difference of log-probabilities with and without the layers; float32 hosts differ by about 1e-6.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_TOLERANCE_HALF = 0.1


class SkippingError(HostError):
    """Why a host can't run without its lower layers."""


class LowerLayers:
    """Keeps the output of the hooked layer of one forward, and runs others from it, without audio.

    All hooks of the layers run in both, those of the memory too. Forwards of other threads are not changed.

    Args:
        memory: Attached to the host.

    Attributes:
        seen: Whether a forward has been captured, as `skipping` needs.

    Raises:
        SkippingError: The host is of a kind that always needs its lower layers.
    """

    def __init__(self, memory: AttachedMemory) -> None:
        if memory.host.audio_positions == "every" or memory.host.stream_idx is not None:
            raise SkippingError("it has audio at every position, or several streams")
        self._layers: list[nn.Module] = list(memory.decoder_layers)[: memory.layer_idx + 1]
        if any("forward" in vars(layer) and not _skipped(layer) for layer in self._layers):
            raise SkippingError("its layers are offloaded or wrapped")
        self._extras: dict[nn.Module, int | None] = {}  # number of Nones after the hidden states; None if no tuple

    @property
    def seen(self) -> bool:
        """Whether a forward has been captured."""
        return bool(self._extras)

    @property
    def skipped(self) -> bool:
        """Whether the layers are left out already, by a block of `skipping` that is open."""
        return _skipped(self._layers[-1])

    @contextmanager
    def capturing(self, session: Session) -> Iterator[Captured]:
        """Within this block, the forward of this thread in the open session `session` is captured.

        Yields:
            What the forward gives.
        """
        captured, thread = Captured(), threading.get_ident()

        def capture(layer: nn.Module, _: Any, output: Any) -> None:
            if threading.get_ident() != thread:
                return
            states, *rest = output if isinstance(output, tuple) else (output,)
            if any(value is not None for value in rest):
                captured.problem = "a layer returns more than hidden states"
            self._extras[layer] = len(rest) if isinstance(output, tuple) else None
            if layer is self._layers[-1] and session.forward is not None:
                captured.hidden = states
                captured.mask = session.forward.mask if session.audio_mask is None else session.audio_mask

        # Before the memory's hook, which adds to the output; within a session, which finds the audio positions.
        handles = [layer.register_forward_hook(capture, prepend=True) for layer in self._layers]
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def skipping(self, hidden: Float[Tensor, "batch seq_len hidden_size"]) -> Iterator[None]:
        """Within this block, the layers return `hidden` to this thread without computing anything."""
        try:
            for layer in self._layers:
                extras = self._extras[layer]
                output = hidden if extras is None else (hidden, *[None] * extras)
                layer.forward = _Skip(layer.forward, output)
            yield
        finally:
            for layer in self._layers:
                vars(layer).pop("forward", None)


class Captured:
    """What a forward has given.

    Attributes:
        hidden: (batch, seq_len, hidden_size), the output of the hooked layer, without the memory's residual.
        mask: (batch, seq_len) bool, where audio is.
        problem: Why no forward can run from it; None if nothing is known.
    """

    def __init__(self) -> None:
        self.problem: str | None = None
        self.hidden: Float[Tensor, "batch seq_len hidden_size"] | None = None
        self.mask: Bool[Tensor, "batch seq_len"] | None = None

    def of(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(hidden, mask).

        Raises:
            SkippingError: The layers return more, or they are not of the positions of the input ids.
        """
        if self.problem is not None:
            raise SkippingError(self.problem)
        if self.hidden is None or self.mask is None or self.hidden.shape[:2] != inputs["input_ids"].shape:
            raise SkippingError("its layers see other positions than its input ids")
        return self.hidden, self.mask


class _Skip:
    """In place of a layer's forward."""

    def __init__(self, forward: Any, output: Any) -> None:
        self._forward, self._output, self._thread = forward, output, threading.get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mine = threading.get_ident() == self._thread
        return self._output if mine else self._forward(*args, **kwargs)


def check_scores(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Raise `SkippingError` if the scores without the layers differ from those of the whole host, of this dtype."""
    if (distance := float((found - expected).abs().max())) > _TOLERANCE.get(dtype, _TOLERANCE_HALF):
        raise SkippingError(f"its scores differ by {distance:.2g}")


def _skipped(layer: nn.Module) -> bool:
    return isinstance(vars(layer).get("forward"), _Skip)
