"""Drawing a dialogue's turns from the clips of some speakers."""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from mal_adapter.ser.clips.clip import Clip
from mal_adapter.ser.simulation.config import SimulationConfig
from mal_adapter.ser.simulation.mood import Mood, next_emotion
from mal_adapter.ser.simulation.order import turn_order

__all__ = ["Pool", "clips_needed"]


def clips_needed(config: SimulationConfig) -> int:
    """How many clips a speaker needs, so that no dialogue can run out of them."""
    return -(-config.turns // config.speakers) if config.turn_taking == "alternating" else config.turns


class Pool:
    """The clips of one corpus in one split. Speakers and clips are drawn so that all are used about equally often.

    Args:
        clips: Clips of `config.speakers` speakers or more, of each at least `clips_needed`.
        emotions: All emotions that may be drawn.
        neutral: The emotion of a speaker's first turn; None to draw that, too.
        mood: How emotions persist.
        chance: Decides everything.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        config: SimulationConfig,
        emotions: Sequence[str],
        neutral: str | None,
        mood: Mood,
        chance: random.Random,
    ) -> None:
        self._config, self._emotions, self._neutral, self._mood = config, emotions, neutral, mood
        self._chance = chance
        self._clips: defaultdict[str, defaultdict[str, list[Clip]]] = defaultdict(lambda: defaultdict(list))
        for clip in clips:
            self._clips[clip.speaker][clip.emotion].append(clip)
        self._speaker_uses: Counter[str] = Counter()
        self._clip_uses: Counter[Clip] = Counter()

    def draw(self) -> list[Clip]:
        """The clips of one dialogue, none of them twice."""
        config = self._config
        speakers = sorted(self._clips, key=lambda name: (self._speaker_uses[name], self._chance.random()))
        speakers = speakers[: config.speakers]
        self._chance.shuffle(speakers)
        self._speaker_uses.update(speakers)
        left = {name: {emotion: list(some) for emotion, some in self._clips[name].items()} for name in speakers}
        last: dict[str, str] = {}
        turns: list[Clip] = []
        for speaker in turn_order(speakers, config.turns, config.turn_taking, config.change, self._chance):
            before = turns[-1].emotion if turns else None
            emotion = self._emotion(left[speaker], last.get(speaker), before)
            clip = min(left[speaker][emotion], key=lambda clip: (self._clip_uses[clip], self._chance.random()))
            left[speaker][emotion].remove(clip)
            self._clip_uses[clip] += 1
            last[speaker] = emotion
            turns.append(clip)
        return turns

    def _emotion(self, left: Mapping[str, Sequence[Clip]], own: str | None, before: str | None) -> str:
        choice = [emotion for emotion in self._emotions if left.get(emotion)]
        if own is None and self._neutral in choice:
            return str(self._neutral)
        return next_emotion(self._mood, own, before, choice, self._chance)
