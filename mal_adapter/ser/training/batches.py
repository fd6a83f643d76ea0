"""The batches of an epoch, and the next utterances of the dialogues in a batch."""

import logging
from collections import deque
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from mal_adapter.ser.dialogue import Dialogue, Utterance
from mal_adapter.ser.recognizer.results import Failure
from mal_adapter.ser.training.batch_scorer import BatchScorer

__all__ = ["Turn", "Unusable", "batches_of_epoch", "report_unusable", "side_by_side"]

_LOGGER = logging.getLogger(__name__)

#: Why the audio of an utterance can not be used, by (dialogue_id, utterance_id).
Unusable = MutableMapping[tuple[str, str], str]

# Sorting a whole epoch by length would always group the same dialogues, so only this many batches are sorted at once.
_POOL = 16


def batches_of_epoch(dialogues: Sequence[Dialogue], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Group the indices of all dialogues into batches of similar length, in another random order for each epoch.

    Example:
        >>> lengths = [2, 9, 3, 8]
        >>> turns = [[Utterance(str(d), str(n), "A", "a.wav") for n in range(t)] for d, t in enumerate(lengths)]
        >>> calls = [Dialogue(str(d), tuple(ts)) for d, ts in enumerate(turns)]
        >>> sorted(sorted(batch) for batch in batches_of_epoch(calls, batch_size=2, seed=0, epoch=0))
        [[0, 2], [1, 3]]
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(dialogues)).tolist()
    batches: list[list[int]] = []
    for start in range(0, len(order), _POOL * batch_size):
        pool = sorted(order[start : start + _POOL * batch_size], key=lambda i: len(dialogues[i].utterances))
        batches += [pool[first : first + batch_size] for first in range(0, len(pool), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


@dataclass(frozen=True)
class Turn:
    """The next utterance of each dialogue that has one.

    Args:
        utterances: One per row.
        inputs: Those of the host, a row per utterance.
        audio_mask: Where audio is, for the session, if the inputs don't show it.
    """

    utterances: list[Utterance]
    inputs: dict[str, Any]
    audio_mask: Bool[Tensor, "batch seq_len"] | None = None

    @property
    def ids(self) -> list[str]:
        """The dialogue id of each row."""
        return [utterance.dialogue_id for utterance in self.utterances]


def side_by_side(scorer: BatchScorer, dialogues: Sequence[Dialogue], unusable: Unusable) -> Iterator[Turn]:
    """Iterate over several dialogues at once. Finished dialogues drop out, the others keep their order.

    If the audio of an utterance can't be used, this is logged once, and the next utterance of its dialogue takes its
    place.

    What is mutated: `unusable` gets an entry for each such utterance.
    """
    waiting = [deque(dialogue.utterances) for dialogue in dialogues]

    def next_usable(turns: deque[Utterance]) -> Utterance | None:
        while turns:
            utterance = turns.popleft()
            if (utterance.dialogue_id, utterance.utterance_id) not in unusable:
                return utterance
        return None

    while waiting:
        candidates = [next_usable(turns) for turns in waiting]
        while True:
            active = [(turns, u) for turns, u in zip(waiting, candidates, strict=True) if u is not None]
            waiting, chosen = [turns for turns, _ in active], [utterance for _, utterance in active]
            if not chosen:
                return
            prepared = scorer.prepare(chosen)
            if not prepared.failures:
                yield Turn(chosen, prepared.inputs, prepared.audio_mask)
                break
            for failure in prepared.failures.values():
                report_unusable(failure, unusable)
            candidates = [
                next_usable(waiting[row]) if row in prepared.failures else utterance
                for row, utterance in enumerate(chosen)
            ]


def report_unusable(failure: Failure, unusable: Unusable) -> None:
    """Log that an utterance is left out, and record the reason in `unusable`."""
    lost = failure.utterance
    unusable[lost.dialogue_id, lost.utterance_id] = str(failure.error)
    _LOGGER.warning("left out: dialogue %s, utterance %s: %s", lost.dialogue_id, lost.utterance_id, failure.error)
