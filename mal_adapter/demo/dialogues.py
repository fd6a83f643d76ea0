"""Seeded two-speaker dialogues: who speaks when, with which emotion, and the audio, in memory or as real WAV files.

Dialogue number i of a split is the same whatever else is drawn: its random generator is derived from (split, seed, i).
The four splits use different first numbers, so no dialogue of one can reappear in another, whatever the seeds.
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

#: The host's own training data, the adapter's and readers' training data, and two held-out splits.
SPLITS: dict[str, int] = {"host": 0, "train": 1, "dev": 2, "test": 3}

TURNS = 10  # utterances per dialogue
FIRST_NEUTRAL = 0.8  # probability that a speaker's first utterance is neutral
CHANGE = 0.65  # probability that a speaker's emotion differs from the one before
MIN_TRACT_RATIO = 1.18  # the two speakers of a dialogue are told apart by their vocal tracts


@dataclass(frozen=True)
class Turn:
    """One utterance of a dialogue: speaker index 0 or 1, emotion, the true values, and 16-bit mono audio at 16 kHz."""

    speaker: int
    emotion: str
    speech: Speech
    pcm: NDArray[np.int16]

    @property
    def audio(self) -> NDArray[np.float32]:
        """The samples as a reader of the WAV file gets them: float32 in [-1, 1), shape (samples,)."""
        return self.pcm.astype(np.float32) / 32768.0

    @property
    def label(self) -> int:
        """Index of the emotion in EMOTIONS."""
        return EMOTIONS.index(self.emotion)


@dataclass(frozen=True)
class SpokenDialogue:
    """A dialogue in memory, with the baselines that only the synthesiser knows."""

    dialogue_id: str
    speakers: tuple[Speaker, Speaker]
    turns: tuple[Turn, ...]


def make_dialogue(split: str, seed: int, index: int, turns: int = TURNS) -> SpokenDialogue:
    """Make dialogue number `index` of a split: two voices some way apart, random turn order, both speak.

    Args:
        split: "host", "train", "dev" or "test".
        seed: a non-negative integer; another seed is another set of dialogues of that split.
        index: the dialogue's number within the split.
        turns: how many utterances, at least 2.
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
    """Make dialogues 0 … count-1 of a split, one at a time (about 27 ms each)."""
    return (make_dialogue(split, seed, index, turns) for index in range(count))


def write_wavs(dialogues: Sequence[SpokenDialogue], folder: str | Path) -> list[Dialogue]:
    """Write one PCM_16 WAV file per utterance and `manifest.jsonl` beside them; return what the manifest holds.

    Reading a file back gives exactly `Turn.audio`.
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
    """A random order of speakers 0 and 1 in which both speak; drawn again until they do."""
    if turns < 2:
        raise ValueError(f"a dialogue of two speakers needs at least 2 turns, got {turns}")
    while True:
        order = [int(speaker) for speaker in rng.integers(2, size=turns)]
        if 0 < sum(order) < turns:
            return order


def _next_emotion(previous: str | None, rng: np.random.Generator) -> str:
    """Mostly neutral at first; later a different emotion with probability CHANGE, else the same again."""
    if previous is None:
        return "neutral" if rng.random() < FIRST_NEUTRAL else str(rng.choice(EMOTIONS[1:]))
    if rng.random() < CHANGE:
        return str(rng.choice([emotion for emotion in EMOTIONS if emotion != previous]))
    return previous
