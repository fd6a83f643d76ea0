"""How emotions persist.

A turn copies the emotion of its speaker's previous turn, or of the dialogue's previous turn, or draws one evenly.
`fitted` finds the probabilities of the two copies with which the emotions persist as often as asked.
"""

import functools
import random
from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeVar

from mal_adapter.errors import ConfigError
from mal_adapter.ser.simulation.config import SimulationConfig
from mal_adapter.ser.simulation.order import turn_order

__all__ = ["Mood", "Persistence", "fitted", "next_emotion", "persistence"]

_Emotion = TypeVar("_Emotion", bound=Hashable)
#: Dialogues of a trial, whose some 5 000 turns tell a persistence to one percent; and the most trials.
TRIAL, TRIALS = 500, 60
#: The part of an error that a trial corrects: persistences near 1 answer so strongly that the whole error overshoots.
STEP = 0.4
#: How far from what was asked the fit may be.
TOLERANCE = 0.02


class Mood(NamedTuple):
    """The probabilities that a turn copies the emotion of its speaker's, or of the dialogue's previous turn."""

    of_speaker: float
    of_dialogue: float


class Persistence(NamedTuple):
    """How often a turn has the emotion of the same speaker's, and of the dialogue's previous turn; 0 without any."""

    speaker: float
    dialogue: float


def next_emotion(
    mood: Mood, own: _Emotion | None, before: _Emotion | None, choice: Sequence[_Emotion], chance: random.Random
) -> _Emotion:
    """Draw the emotion of a turn.

    Args:
        own, before: The emotion of the speaker's and of the dialogue's previous turn; None if there is none.
        choice: The emotions that can be drawn. One to copy that is not among them is not copied.
    """
    roll = chance.random()
    wanted = own if roll < mood.of_speaker else before if roll < mood.of_speaker + mood.of_dialogue else None
    return wanted if wanted is not None and wanted in choice else choice[chance.randrange(len(choice))]


def persistence(dialogues: Sequence[Sequence[tuple[Hashable, Hashable]]]) -> Persistence:
    """Count how emotions persist.

    Args:
        dialogues: Of each the (speaker, emotion) of the turns.

    Example:
        >>> persistence([[("A", "sad"), ("B", "sad"), ("A", "happy"), ("B", "sad")]])
        Persistence(speaker=0.5, dialogue=0.3333333333333333)
    """
    counts = {"speaker": [0, 0], "dialogue": [0, 0]}
    for turns in dialogues:
        last: dict[Hashable, Hashable] = {}
        for place, (speaker, emotion) in enumerate(turns):
            pairs = [("speaker", last[speaker])] if speaker in last else []
            pairs += [("dialogue", turns[place - 1][1])] if place else []
            for kind, earlier in pairs:
                counts[kind][0] += emotion == earlier
                counts[kind][1] += 1
            last[speaker] = emotion
    return Persistence(*(same / total if total else 0.0 for same, total in counts.values()))


@functools.lru_cache(maxsize=16)  # corpora with as many emotions share it
def fitted(config: SimulationConfig, emotions: int) -> Mood:
    """The probabilities of copying with which emotions persist as the configuration asks.

    They are found by making dialogues of numbers instead of clips, always the same ones.

    Args:
        emotions: The number of emotions, of which the first is neutral.

    Raises:
        ConfigError: No probabilities give both.
    """
    asked = Persistence(*(p or 0.0 for p in (config.speaker_persistence, config.dialogue_persistence)))
    of_speaker, of_dialogue = config.speaker_persistence is not None, config.dialogue_persistence is not None
    mood = Mood(asked.speaker / 2 * of_speaker, asked.dialogue / 4 * of_dialogue)
    if not (of_speaker or of_dialogue):
        return mood
    found = Persistence(0.0, 0.0)
    for _ in range(TRIALS):
        found = persistence([_numbers(config, mood, emotions, random.Random(trial)) for trial in range(TRIAL)])
        errors = (asked.speaker - found.speaker) * of_speaker, (asked.dialogue - found.dialogue) * of_dialogue
        if max(map(abs, errors)) < TOLERANCE / 4:
            break
        speaker, dialogue = (copied + STEP * error for copied, error in zip(mood, errors, strict=True))
        speaker, dialogue = max(0.0, speaker), max(0.0, dialogue)
        above = max(1.0, speaker + dialogue)
        mood = Mood(round(speaker / above, 4), round(dialogue / above, 4))
    for name, wanted, got, given in zip(asked._fields, asked, found, (of_speaker, of_dialogue), strict=True):
        if given and abs(wanted - got) > TOLERANCE:
            raise ConfigError(
                f"{name}_persistence can't be {wanted} with {emotions} emotions and the other settings; the nearest is "
                f"{got:.2f} ({1 / emotions:.2f} is chance, and each of the two persistences raises the other)"
            )
    return mood


def _numbers(config: SimulationConfig, mood: Mood, emotions: int, chance: random.Random) -> list[tuple[int, int]]:
    """A dialogue of numbers: the (speaker, emotion) of its turns."""
    order = turn_order(range(config.speakers), config.turns, config.turn_taking, config.change, chance)
    last: dict[int, int] = {}
    turns: list[tuple[int, int]] = []
    for speaker in order:
        if config.neutral_start and speaker not in last:
            emotion = 0
        else:
            before = turns[-1][1] if turns else None
            emotion = next_emotion(mood, last.get(speaker), before, range(emotions), chance)
        last[speaker] = emotion
        turns.append((speaker, emotion))
    return turns
