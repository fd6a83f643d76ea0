"""The answers of an adapter with several members: the mean of their probabilities."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mal_adapter.hooks.session import Session
from mal_adapter.ser.recognizer.lower_layers import LowerLayers, SkippingError, check_scores

if TYPE_CHECKING:
    from mal_adapter.attach import AttachedMemory

__all__ = ["MeanOfMembers"]

_LOGGER = logging.getLogger(__name__)
_TEXT = ("input_ids", "attention_mask", "position_ids")
Scores = Float[Tensor, "batch labels"]


class MeanOfMembers:
    """Scores the labels with each member, in one forward of the whole host, and for each further member one of the
    layers above the memory. Below it nothing depends on the member.

    Probabilities are averaged, as deep ensembles do (arXiv 1612.01474), and not logits: a mean of logits is a product,
    in which one member that rules a label out decides for all.

    A host that can't run so runs as a whole for each member; this is logged once.

    Args:
        memory: Attached to the host.
        run: Runs the host on inputs in the open session: the log-probabilities of the labels.
        dtype: The host's.
        needs_cache: Whether the scores need the KV cache of all layers.
    """

    def __init__(
        self, memory: AttachedMemory, run: Callable[[dict[str, Any]], Scores], dtype: torch.dtype, *, needs_cache: bool
    ) -> None:
        self._memory, self._run, self._dtype = memory, run, dtype
        self._lower: LowerLayers | None = None
        self._checked = False
        try:
            if needs_cache:
                raise SkippingError("labels of several tokens need the cache of all layers")
            self._lower = LowerLayers(memory)
        except SkippingError as error:
            self._give_up(error)

    def __call__(self, inputs: dict[str, Any]) -> Scores:
        """The logarithm of the members' mean probability of each label among all labels, within the open session.

        What is mutated: the utterances are written to the session's dialogues, by all members or by none.

        Args:
            inputs: From `EmotionRecognizer.prepare`, or of a host whose lower layers are left out already.

        Returns:
            (batch, labels) float32.
        """
        kept: list[tuple[Tensor, Tensor]] = []

        def score(session: Session) -> Scores:
            lower = self._lower
            if lower is None or lower.skipped:
                return self._run(inputs)
            if kept:
                hidden, session.audio_mask = kept[0]
                with lower.skipping(hidden):
                    return self._run(_text(inputs))
            with lower.capturing(session) as captured:
                scores = self._run(inputs)
            try:
                kept.append(captured.of(inputs))
                if not self._checked:
                    self._check(lower, inputs, kept[0][0])
            except SkippingError as error:
                self._give_up(error)
            return scores

        by_member = torch.stack(self._memory.by_member(score))
        return by_member.log_softmax(-1).logsumexp(0) - math.log(len(by_member))

    @torch.no_grad()
    def _check(self, lower: LowerLayers, inputs: dict[str, Any], hidden: Tensor) -> None:
        """Raise `SkippingError` if the bare host answers otherwise without its lower layers."""
        with self._memory.disabled():
            expected = self._run(inputs)
            try:
                with lower.skipping(hidden):
                    found = self._run(_text(inputs))
            except Exception as error:  # from the host's own code, which needs what is missing here
                raise SkippingError(f"{type(error).__name__}: {error}") from error
        check_scores(found, expected, self._dtype)
        self._checked = True

    def _give_up(self, error: SkippingError) -> None:
        self._lower = None
        _LOGGER.warning("each member of the memory runs the whole host, which takes longer: %s", error)


def _text(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs without audio, for a host that starts behind it."""
    return {name: inputs[name] for name in _TEXT if name in inputs}
