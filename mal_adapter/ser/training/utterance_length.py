"""The usual number of audio tokens of an utterance, measured on training data, to start a memory's gates."""

import statistics
from collections.abc import Sequence

from mal_adapter.ser.dialogue import Dialogue
from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer

__all__ = ["usual_tokens"]

_SAMPLE = 32


def usual_tokens(recognizer: EmotionRecognizer, dialogues: Sequence[Dialogue], batch_size: int) -> int | None:
    """The median number of audio tokens that a memory gets from an utterance.

    It is measured on 32 utterances at equal distances, so every process of a training gets the same number.

    Args:
        recognizer: With a memory.
        dialogues: The training data.
        batch_size: Utterances per forward of the host.

    Returns:
        The median, or None if the audio of none of the utterances can be used.
    """
    utterances = [utterance for dialogue in dialogues for utterance in dialogue.utterances]
    sample = utterances[:: max(1, len(utterances) // _SAMPLE)][:_SAMPLE]
    counts = []
    for start in range(0, len(sample), batch_size):
        batch = sample[start : start + batch_size]
        for answer in recognizer.answer_from(batch, [None] * len(batch)):
            if answer.state is not None and (tokens := int(answer.state.tokens)):
                counts.append(tokens)
    return round(statistics.median(counts)) if counts else None
