"""The clips of one split from which dialogues are drawn: which corpora and speakers have enough."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from random import Random

from mal_adapter.errors import ConfigError
from mal_adapter.ser.clips.clip import Clip, ClipCorpus
from mal_adapter.ser.labels import LabelSet
from mal_adapter.ser.simulation.config import SimulationConfig
from mal_adapter.ser.simulation.draw import Pool, clips_needed
from mal_adapter.ser.simulation.mood import fitted

__all__ = ["Pools"]


class Pools:
    """Draws the dialogues of each split.

    Args:
        corpora: With the emotions of `labels` alone.
        labels: All emotions.
        neutral: The emotion of a speaker's first turn; None to draw that, too.

    Attributes:
        notes: Which corpora and speakers could not be used, in sentences; they come with the splits.
    """

    def __init__(
        self, corpora: Sequence[ClipCorpus], config: SimulationConfig, labels: LabelSet, neutral: str | None
    ) -> None:
        self._config, self._labels, self._neutral = config, labels, neutral
        self._emotions = {corpus.name: len({clip.emotion for clip in corpus.clips}) for corpus in corpora}
        self.notes: list[str] = []

    def dialogues(self, split: str, of_corpora: Mapping[str, Sequence[Clip]], count: int) -> list[list[Clip]]:
        """The clips of `count` dialogues: of all corpora in turn, of each as often as it has clips.

        Args:
            of_corpora: Corpus -> the split's clips.

        Raises:
            ConfigError: No corpus has enough speakers in this split.
        """
        enough = {name: clips for name, all_of in of_corpora.items() if (clips := self._usable(split, name, all_of))}
        if not enough:
            raise ConfigError(self._too_few(split, of_corpora))
        pools = {name: self._pool(split, name, clips) for name, clips in enough.items()}
        total = sum(map(len, enough.values()))
        made: Counter[str] = Counter()
        dialogues = []
        for number in range(1, count + 1):
            name = max(pools, key=lambda name: len(enough[name]) / total * number - made[name])
            made[name] += 1
            dialogues.append(pools[name].draw())
        return dialogues

    def _usable(self, split: str, name: str, clips: Sequence[Clip]) -> list[Clip]:
        """The clips of speakers with enough of them; none if there are too few such speakers."""
        count = Counter(clip.speaker for clip in clips)
        has: defaultdict[str, set[str]] = defaultdict(set)
        for clip in clips:
            has[clip.speaker].add(clip.emotion)
        needed = clips_needed(self._config)
        # A voice that has few of the emotions would tell them.
        speakers = {who for who in count if count[who] >= needed and len(has[who]) > self._emotions[name] / 2}
        if few := len(count) - len(speakers):
            self.notes.append(
                f"{split}: {few} speakers of {name} have fewer than {needed} clips, or half of the emotions or fewer, "
                "and are left out"
            )
        if len(speakers) < self._config.speakers:
            self.notes.append(f"{split} has no dialogues of {name}, which has {len(speakers)} speakers for it")
            return []
        return [clip for clip in clips if clip.speaker in speakers]

    def _pool(self, split: str, name: str, clips: Sequence[Clip]) -> Pool:
        mood = fitted(self._config, max(2, self._emotions[name]))
        chance = Random(f"{self._config.seed}/{split}/{name}")
        return Pool(clips, self._config, list(self._labels), self._neutral, mood, chance)

    def _too_few(self, split: str, of_corpora: Mapping[str, Sequence[Clip]]) -> str:
        speakers = {name: len({clip.speaker for clip in clips}) for name, clips in of_corpora.items()}
        shown = ", ".join(f"{count} of {name}" for name, count in speakers.items()) or "none"
        instead = {"test": "eval_dialogues to 0", "dev": "dev_share to 0"}.get(
            split, "smaller shares of the other splits"
        )
        return (
            f"{split} has no corpus with {self._config.speakers} speakers for a dialogue (and "
            f"{clips_needed(self._config)} clips of each): it has {shown}; give it a larger share, use fewer folds, "
            f"speakers or turns per dialogue, or set {instead}"
        )
