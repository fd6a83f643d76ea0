"""Reading dialogues, for the commands that train and evaluate."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mal_adapter.cli.output import note

if TYPE_CHECKING:
    from mal_adapter.ser.dialogue import Dialogue
    from mal_adapter.ser.labels import LabelSet

__all__ = ["Data", "note_omissions", "read_data"]


@dataclass(frozen=True)
class Data:
    """Dialogues of one or more splits.

    Args:
        name: The name of the corpus.
        split: The names of the splits; None if the corpus has only one.
        dialogues: The dialogues, in order.
        labels: The corpus's own label set; None for a manifest.
    """

    name: str
    split: str | None
    dialogues: "list[Dialogue]"
    labels: "LabelSet | None"


def read_data(corpus: str, root: Path | None, splits: Sequence[str] | None, usual: Sequence[str]) -> Data:
    """Read the given splits of a corpus; without any, the `usual` ones if the corpus has them, else its only one.

    Raises:
        ConfigError: The corpus has no such split; or none was given, and the corpus has several.
        CorpusError, ManifestError: The corpus can't be read.
    """
    from mal_adapter.errors import ConfigError
    from mal_adapter.ser.corpora import read_corpus
    from mal_adapter.ser.dialogue import read_manifest
    from mal_adapter.ser.names import composed, folded
    from mal_adapter.ser.paths import existing_path

    path = existing_path(Path(corpus))
    if root is None and path.is_file() and not splits:
        return Data(composed(path.stem), None, read_manifest(path), None)
    found = read_corpus(corpus, root)
    there = list(found.splits)
    spelled = {folded(name): name for name in there}
    chosen = [spelled.get(folded(name), name) for name in splits or ()]
    if not chosen:
        chosen = [spelled[name] for name in usual if name in spelled] or there
        if chosen == there and len(there) > 1:
            raise ConfigError(f"{corpus} has the splits {', '.join(there)}; choose with --split")
    if unknown := [name for name in chosen if name not in there]:
        raise ConfigError(f"{corpus} has no split {unknown[0]!r}, but {', '.join(there)}")
    dialogues = [dialogue for name in chosen for dialogue in found.splits[name]]
    split = " ".join(chosen) if len(there) > 1 else None
    return Data(found.name, split, dialogues, found.labels)


def note_omissions(dialogues: "Sequence[Dialogue]", labels: "LabelSet") -> None:
    """Print notes about emotions that are not among the labels, and about sound files that do not exist."""
    from mal_adapter.ser.suitability import missing_sounds

    emotions = Counter(u.emotion for dialogue in dialogues for u in dialogue.utterances if u.emotion is not None)
    for emotion, count in emotions.items():
        if emotion not in labels:
            note(f"{count} utterances are {emotion!r}, which is not a label: they are processed, but not scored")
    missing, count = missing_sounds(dialogues)
    if missing:
        note(f"{len(missing)} of {count} sound files are missing, such as {missing[0]}: their utterances are left out")
