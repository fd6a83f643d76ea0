"""A clip of one speaker and one emotion, and the clips of a corpus."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Clip", "ClipCorpus"]

#: How many names of a list a message shows.
SHOWN = 5


@dataclass(frozen=True)
class Clip:
    """One sound file with one utterance.

    Args:
        path: The sound file.
        speaker: The speaker, with the corpus in front, so that it is unique over corpora: "ravdess-01".
        emotion: One word, as "angry"; the readers of named corpora use neutral, calm, happy, sad, angry, fear, disgust,
            surprise and boredom.
        sex: "f" or "m" if the corpus says it.
        text_id: Which sentence is spoken, unique in the corpus; None if it is not known.
        intensity: How strongly the emotion was to be acted, in the corpus's own words; None if it says nothing.
    """

    path: Path
    speaker: str
    emotion: str
    sex: str | None = None
    text_id: str | None = None
    intensity: str | None = None


@dataclass(frozen=True)
class ClipCorpus:
    """The clips of a corpus. `print(corpus)` shows them by emotion, and what was left out.

    Args:
        name: The name of the corpus.
        clips: Sorted by their paths.
        left_out: Path below the root -> why the file is no clip.
        known: Keys of `left_out` that are expected: damaged in the release itself, copies, or songs and videos.
    """

    name: str
    clips: tuple[Clip, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    known: frozenset[str] = frozenset()

    def summary(self) -> str:
        """One line: which files were left out unexpectedly, with the first few names."""
        odd = [f"{name} ({reason})" for name, reason in self.left_out.items() if name not in self.known]
        more = f" and {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
        return f"{len(odd)} files are left out: {', '.join(odd[:SHOWN])}{more}" if odd else "complete"

    def __str__(self) -> str:
        emotions = Counter(clip.emotion for clip in self.clips)
        sexes = Counter({clip.speaker: clip.sex for clip in self.clips}.values())
        speakers = ", ".join(f"{count} {sex or 'of unknown sex'}" for sex, count in sexes.items())
        lines = [f"{self.name}: {len(self.clips)} clips, {sexes.total()} speakers ({speakers})"]
        lines += [f"  {emotion:<12}{count:>7}" for emotion, count in emotions.most_common()]
        for name, reason in self.left_out.items():
            lines.append(f"- left out: {name}: {reason}" + (" (known)" if name in self.known else ""))
        return "\n".join(lines)
