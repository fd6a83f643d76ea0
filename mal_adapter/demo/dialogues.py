"""Seeded two-speaker dialogues: who speaks when, with which emotion, and the audio, in memory or as WAV files.

The random generator of dialogue i is derived from (split, seed, i), so that it does not depend on other dialogues.
Each split has its own number, so that no dialogue of one split is also in another, whatever the seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mal_adapter.demo.shipped import EMOTIONS
from mal_adapter.demo.voices import SAMPLING_RATE, Speaker, Speech, draw_speaker, draw_speech, quantise, synthesise

if TYPE_CHECKING:
    from mal_adapter.ser.dialogue import Dialogue

__all__ = [
    "MIN_TRACT_RATIO",
    "SPLITS",
    "TURNS",
    "SpokenDialogue",
    "Turn",
    "make_dialogue",
    "make_dialogues",
    "write_wavs",
]

#: The host's training data, the training data of adapters and readers, and two held-out splits.
SPLITS: dict[str, int] = {"host": 0, "train": 1, "dev": 2, "test": 3}

TURNS = 10  # utterances per dialogue
FIRST_NEUTRAL = 0.8  # probability that a speaker's first utterance is neutral
CHANGE = 0.65  # probability that a speaker's emotion differs from their previous one
MIN_TRACT_RATIO = 1.18  # the vocal tracts of the two speakers of a dialogue differ by at least this factor


@dataclass(frozen=True)
class Turn:
    """One utterance of a dialogue: speaker index 0 or 1, emotion, the true values, and 16-bit mono audio at 16 kHz."""

    speaker: int
    emotion: str
    speech: Speech
    pcm: NDArray[np.int16]

    @property
    def audio(self) -> NDArray[np.float32]:
        """The samples as read from the WAV file: float32 in [-1, 1), shape (samples,)."""
        return self.pcm.astype(np.float32) / 32768.0

    @property
    def label(self) -> int:
        """Index of the emotion in EMOTIONS."""
        return EMOTIONS.index(self.emotion)


@dataclass(frozen=True)
class SpokenDialogue:
    """A dialogue in main memory, with the true baselines of its speakers."""

    dialogue_id: str
    speakers: tuple[Speaker, Speaker]
    turns: tuple[Turn, ...]


def make_dialogue(split: str, seed: int, index: int, turns: int = TURNS) -> SpokenDialogue:
    """Make dialogue number `index` of a split: two different voices that both speak, in random order.

    Args:
        split: "host", "train", "dev" or "test".
        seed: A non-negative integer. Each seed gives another set of dialogues of that split.
        index: The dialogue's number within the split, from 0.
        turns: Number of utterances, at least 2.

    Raises:
        KeyError: There is no such split.
        ValueError: `turns` is below 2, or `seed` or `index` is negative.

    Example:
        >>> dialogue = make_dialogue("test", seed=0, index=4, turns=2)
        >>> dialogue.dialogue_id, sorted(turn.speaker for turn in dialogue.turns)
        ('test-0-00004', [0, 1])
    """
    rng = np.random.default_rng(np.random.SeedSequence([SPLITS[split], seed, index]))
    speakers = _draw_pair(rng)
    order = _turn_order(turns, rng)
    current: dict[int, str] = {}
    spoken: list[Turn] = []
    for speaker in order:
        emotion = _next_emotion(current.get(speaker), rng)
        current[speaker] = emotion
        speech = draw_speech(speakers[speaker], emotion, rng)
        spoken.append(Turn(speaker, emotion, speech, quantise(synthesise(speech, rng))))
    return SpokenDialogue(f"{split}-{seed}-{index:05d}", speakers, tuple(spoken))


def make_dialogues(split: str, seed: int, count: int, turns: int = TURNS) -> Iterator[SpokenDialogue]:
    """Make dialogues 0 … count-1 of a split, one at a time (about 27 ms each).

    Args:
        split, seed, turns: As for `make_dialogue`.
        count: Number of dialogues.

    Example:
        >>> [dialogue.dialogue_id for dialogue in make_dialogues("dev", seed=3, count=2, turns=2)]
        ['dev-3-00000', 'dev-3-00001']
    """
    return (make_dialogue(split, seed, index, turns) for index in range(count))


def write_wavs(dialogues: Sequence[SpokenDialogue], folder: str | Path) -> list[Dialogue]:
    """Write one PCM_16 WAV file per utterance, and `manifest.jsonl`, into a folder. Reading a file gives `Turn.audio`.

    Args:
        dialogues: From `make_dialogue`.
        folder: Created if it does not exist.

    Returns:
        The dialogues of the manifest.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> (written,) = write_wavs([make_dialogue("test", seed=0, index=0, turns=2)], folder.name)
        >>> [utterance.audio.name for utterance in written.utterances]
        ['test-0-00000-00.wav', 'test-0-00000-01.wav']
        >>> folder.cleanup()
    """
    import soundfile

    from mal_adapter.ser.dialogue import Dialogue, Utterance, write_manifest

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Dialogue] = []
    for dialogue in dialogues:
        utterances: list[Utterance] = []
        for number, turn in enumerate(dialogue.turns):
            utterance_id = f"{dialogue.dialogue_id}-{number:02d}"
            path = folder / f"{utterance_id}.wav"
            soundfile.write(path, turn.pcm, SAMPLING_RATE, subtype="PCM_16")
            speaker = "AB"[turn.speaker]
            utterances.append(Utterance(dialogue.dialogue_id, utterance_id, speaker, path, emotion=turn.emotion))
        written.append(Dialogue(dialogue.dialogue_id, tuple(utterances)))
    write_manifest(written, folder / "manifest.jsonl")
    return written


def _draw_pair(rng: np.random.Generator) -> tuple[Speaker, Speaker]:
    """Draw two speakers whose vocal tracts differ by at least MIN_TRACT_RATIO."""
    first = draw_speaker(rng)
    while True:
        second = draw_speaker(rng)
        if abs(np.log(second.tract / first.tract)) >= np.log(MIN_TRACT_RATIO):
            return first, second


def _turn_order(turns: int, rng: np.random.Generator) -> list[int]:
    """Draw a random order of speakers 0 and 1 in which both speak."""
    if turns < 2:
        raise ValueError(f"a dialogue of two speakers needs at least 2 turns, got {turns}")
    while True:
        order = [int(speaker) for speaker in rng.integers(2, size=turns)]
        if 0 < sum(order) < turns:
            return order


def _next_emotion(previous: str | None, rng: np.random.Generator) -> str:
    """Draw a speaker's next emotion: mostly neutral at first; later another emotion with probability CHANGE."""
    if previous is None:
        return "neutral" if rng.random() < FIRST_NEUTRAL else str(rng.choice(EMOTIONS[1:]))
    if rng.random() < CHANGE:
        return str(rng.choice([emotion for emotion in EMOTIONS if emotion != previous]))
    return previous
