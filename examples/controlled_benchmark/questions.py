"""What the tiny host is asked during its training, and the words it answers with.

A host that learns emotion alone forgets the voice, and no memory can then find the speaker's past. So it
also names the pitch, the level and the size of the vocal tract, as numbers on a scale, and is asked for the vowels.

What the shipped host learns of this in 2 500 steps, on held-out utterances: emotion 61 % (the most that one utterance
allows), pitch, level and tract within one step of 32 on 98 to 99.8 %, the vowels not at all (20 %, chance).
"""

from __future__ import annotations

import math

from mal_adapter.demo import EMOTIONS, PROMPT
from mal_adapter.demo.voices import TRACT_RANGE, VOWELS, Speech

__all__ = ["QUESTIONS", "STEPS", "answer", "tokenizer_corpus"]

#: task -> the question that follows the audio
QUESTIONS: dict[str, str] = {
    "emotion": PROMPT,
    "pitch": "How high is the pitch?",
    "loudness": "How loud is the voice?",
    "tract": "How large is the vocal tract?",
    "vowels": "Which vowels are spoken?",
}

#: Answers on a scale are "0" … "31": fine steps keep the hidden states close to the true value.
STEPS = 32

# (lowest, highest) of each scale: what the voices span, with three standard deviations of noise to spare.
_LOG_PITCH = (math.log(88.0), math.log(740.0))
_LOUDNESS_DB = (-57.0, -13.0)
_LOG_TRACT = (math.log(TRACT_RANGE[0]), math.log(TRACT_RANGE[1]))


def answer(task: str, speech: Speech, emotion: str) -> str:
    """The right answer to QUESTIONS[task] for one utterance."""
    if task == "emotion":
        return emotion
    if task == "vowels":
        return " ".join(speech.vowels)
    if task == "pitch":
        return _step(math.log(speech.pitch_hz), _LOG_PITCH)
    if task == "loudness":
        return _step(speech.loudness_db, _LOUDNESS_DB)
    if task == "tract":
        return _step(math.log(speech.tract), _LOG_TRACT)
    raise KeyError(f"no such task: {task!r}; the tasks are {', '.join(QUESTIONS)}")


def tokenizer_corpus() -> list[str]:
    """Every question and answer, from which the tokenizer learns one token per word."""
    vowels = [" ".join(VOWELS), " " + " ".join(VOWELS)]
    numbers = [str(step) for step in range(STEPS)]
    emotions = [*EMOTIONS, *(f" {word}" for word in EMOTIONS)]
    return [*QUESTIONS.values(), *emotions, *numbers, *vowels, "user", "assistant", "system"]


def _step(value: float, scale: tuple[float, float]) -> str:
    """The step of `scale` that `value` falls on; values outside count as the nearest end."""
    low, high = scale
    return str(min(STEPS - 1, max(0, int((value - low) / (high - low) * STEPS))))
