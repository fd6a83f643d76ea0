"""One pass of the encoder and the lower layers for all arms of an evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mal_adapter.errors import HostError
from mal_adapter.ser.dialogue import Dialogue
from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer
from mal_adapter.ser.training.cached_host import ADVICE, CachedHost
from mal_adapter.ser.training.cached_recognizer import CachedRecognizer

__all__ = ["SharedActivations"]

_LOGGER = logging.getLogger(__name__)


class SharedActivations:
    """Runs the frozen part of the host once per utterance of a group of dialogues, and every arm from its output.

    If the host can't run from activations, each arm runs the whole host; this is logged once.

    Args:
        recognizer: With a memory.
        folder: For a file per utterance, with seq_len · hidden_size numbers in the host's dtype.
        batch_size: Utterances in one forward.
        keep: Leave the files there. Otherwise those of a group are deleted after it, so that the folder never has more
            than one group.
        log: Whether to log that the host can't run from activations; False on all processes but one.
    """

    def __init__(
        self, recognizer: EmotionRecognizer, folder: Path, *, batch_size: int, keep: bool, log: bool = True
    ) -> None:
        self._recognizer, self._batch_size, self._keep, self._log = recognizer, batch_size, keep, log
        self._cached: CachedHost | None = None
        try:
            if recognizer.memory is None or recognizer.labels_need_cache:
                raise HostError("labels of several tokens need the cache of all layers")
            self._cached = CachedHost(recognizer, recognizer.memory, folder)
        except HostError as error:
            self._give_up(error)

    @contextmanager
    def of(self, group: Sequence[Dialogue]) -> Iterator[EmotionRecognizer]:
        """Yield a recogniser for the utterances of these dialogues."""
        utterances = [utterance for dialogue in group for utterance in dialogue.utterances]
        try:
            if self._cached is not None:
                for first in range(0, len(utterances), self._batch_size):
                    self._cached.keep(utterances[first : first + self._batch_size])
        except HostError as error:
            self._give_up(error)
        cached = self._cached
        yield self._recognizer if cached is None else CachedRecognizer(self._recognizer, cached)
        if cached is not None and not self._keep:
            cached.forget(utterances)

    def _give_up(self, error: HostError) -> None:
        self._cached = None
        if self._log:
            reason = str(error).removesuffix(ADVICE)
            _LOGGER.warning("each arm runs the whole host, which takes several times as long: %s", reason)
