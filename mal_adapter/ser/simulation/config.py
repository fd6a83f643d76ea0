"""How dialogues are made of single clips."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mal_adapter.errors import ConfigError

__all__ = ["PRESETS", "SimulationConfig"]

#: Emotions persist about as in MSP-IMPROV's improvised scenes (docs/corpora.md has the count).
MOOD_OF_SPEAKER, MOOD_OF_DIALOGUE = 0.65, 0.55

#: Name -> the fields in which it differs from the defaults.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "voices": {},
    "mood": {"neutral_start": False, "speaker_persistence": MOOD_OF_SPEAKER, "dialogue_persistence": MOOD_OF_DIALOGUE},
}


@dataclass(frozen=True)
class SimulationConfig:
    """How dialogues are made of single clips.

    Args:
        dialogues: Dialogues to train on.
        eval_dialogues: Dialogues of dev, and of test.
        speakers: Speakers per dialogue, all of one corpus.
        turns: Turns per dialogue.
        turn_taking: "alternating": the speakers take turns in a fixed order. "random": see `change`.
        change: Probability that the next turn is another speaker's, if the turn-taking is random.
        neutral_start: Whether each speaker's first turn is neutral, so that the voice comes first without emotion.
        speaker_persistence: Probability that a turn has the emotion of the same speaker's previous turn. None: not more
            often than by chance.
        dialogue_persistence: Probability that a turn has the emotion of the dialogue's previous turn; likewise.
        host_share: Share of the speakers that are kept for training a host. Their clips become a manifest of their own,
            with one utterance per dialogue, because a host must not know the voices that a memory is trained with.
        test_share: Share of the remaining speakers that are in test; without folds.
        folds: Number of folds. Test is fold `fold`, and all folds have the same host speakers.
        fold: Which fold is test: 0 to `folds` - 1.
        dev_share: Share of the speakers neither of the host nor of test that are in dev.
        disjoint_texts: Whether no sentence may be in two splits. Clips with a sentence of another split are dropped.
            Sentences that are spoken in one emotion only, and thus tell it, are in one split in any case.
        seed: The same clips, configuration and seed give the same dialogues.

    Raises:
        ConfigError: A field has a wrong value, or two do not fit.

    Example:
        >>> SimulationConfig.preset("mood", turns=8).speaker_persistence
        0.65
        >>> SimulationConfig(turns=1)
        Traceback (most recent call last):
        mal_adapter.errors.ConfigError: turns must be a whole number of 2 or more, got 1
    """

    dialogues: int = 1000
    eval_dialogues: int = 200
    speakers: int = 2
    turns: int = 10
    turn_taking: str = "alternating"
    change: float = 0.7
    neutral_start: bool = True
    speaker_persistence: float | None = None
    dialogue_persistence: float | None = None
    host_share: float = 0.0
    test_share: float = 0.25
    folds: int | None = None
    fold: int | None = None
    dev_share: float = 0.2
    disjoint_texts: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("dialogues", 1), ("eval_dialogues", 0), ("speakers", 1), ("turns", 2), ("seed", 0)):
            value: object = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be a whole number of {least} or more, got {value!r}")
        for name in ("change", "speaker_persistence", "dialogue_persistence", "host_share", "test_share", "dev_share"):
            value = getattr(self, name)
            if value is None and name.endswith("persistence"):
                continue
            whole = name.endswith("share")  # a split may be empty, but not have all speakers
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1 - 1e-9 * whole:
                raise ConfigError(f"{name} must be a number from 0 to {'below ' * whole}1, got {value!r}")
            if math.isnan(value):
                raise ConfigError(f"{name} must be a number, got {value!r}")
        if self.turn_taking not in ("alternating", "random"):
            raise ConfigError(f"turn_taking must be alternating or random, got {self.turn_taking!r}")
        if (self.folds is None) != (self.fold is None):
            raise ConfigError("folds and fold go together: fold says which of the folds is test")
        if self.folds is not None and not (self.folds >= 2 and self.fold is not None and 0 <= self.fold < self.folds):
            raise ConfigError(f"folds must be 2 or more and fold from 0 to folds - 1, got {self.folds} and {self.fold}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "SimulationConfig":
        """The configuration of a preset: "voices" (the emotion of a turn says nothing about the next, so only the
        speaker's neutral start helps) or "mood" (emotions persist about as in real conversations).

        Args:
            name: Of `PRESETS`.
            changes: Fields to set to something else.

        Raises:
            ConfigError: There is no such preset, no such field, or a value is wrong.
        """
        if name not in PRESETS:
            raise ConfigError(f"there is no preset {name!r}; known are {', '.join(PRESETS)}")
        known = {field.name for field in fields(cls)}
        if unknown := [change for change in changes if change not in known]:
            raise ConfigError(f"there is no field {unknown[0]!r}; known are {', '.join(sorted(known))}")
        return cls(**{**PRESETS[name], **changes})
