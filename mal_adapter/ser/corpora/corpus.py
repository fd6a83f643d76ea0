"""The result of every reader: dialogues per split, and a report of gaps and of deviations from published counts."""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from mal_adapter.errors import CorpusError, IncompleteCorpusWarning
from mal_adapter.ser.corpora.folder import problem_of_clip
from mal_adapter.ser.dialogue import Dialogue, Utterance
from mal_adapter.ser.labels import LabelSet
from mal_adapter.ser.names import composed, label_keys
from mal_adapter.ser.progress import progress_bar

__all__ = ["Corpus", "CorpusReport", "Counts", "Row", "assemble"]

#: How many names of a list a message shows.
SHOWN = 5


@dataclass(frozen=True)
class Counts:
    """Counts of one split. None if no count was published.

    Args:
        dialogues: Dialogues in the annotations.
        utterances: Utterances in the annotations, including those without a label or without audio.
        labelled: Utterances whose emotion is in the label set.
    """

    dialogues: int | None = None
    utterances: int | None = None
    labelled: int | None = None


@dataclass(frozen=True)
class CorpusReport:
    """The counts of a reader beside the published ones, and what was left out. `print(report)` shows it.

    Args:
        found: Split -> counts of the annotations, before anything was left out. "total" has the sums.
        published: Split -> published counts.
        left_out: "split/clip" -> why the utterance is not in its dialogue.
        known: Keys of `left_out` that are missing or damaged in the release itself.
        notes: Other irregularities, in sentences.
    """

    found: Mapping[str, Counts]
    published: Mapping[str, Counts] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    known: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    @property
    def deviations(self) -> tuple[str, ...]:
        """Differences between the counts of the annotations and the published ones, in sentences."""
        sentences = []
        for split, expected in self.published.items():
            for name in ("dialogues", "utterances", "labelled"):
                number, found = getattr(expected, name), getattr(self.found.get(split), name, None)
                if number is not None and found is not None and number != found:
                    what = "labelled utterances" if name == "labelled" else name
                    sentences.append(f"{split} has {found} {what}, published are {number}")
        return tuple(sentences)

    @property
    def complete(self) -> bool:
        """Whether all counts are the published ones, and only clips that the release itself lacks were left out."""
        return not (self.deviations or self.notes or set(self.left_out) - self.known)

    def summary(self) -> str:
        """One line: how much is missing, with the first few names."""
        unexpected = [f"{name} ({reason})" for name, reason in self.left_out.items() if name not in self.known]
        parts = [*self.notes, *self.deviations]
        if unexpected:
            parts.append(f"{len(unexpected)} utterances are left out: {_shown(unexpected)}")
        return "; ".join(parts) or "complete"

    def __str__(self) -> str:
        lines = [f"{'split':<10}{'dialogues':>11}{'utterances':>12}{'labelled':>10}{'left out':>10}"]
        for split, counts in self.found.items():
            gone = sum(split in ("total", name.split("/", 1)[0]) for name in self.left_out)
            lines.append(f"{split:<10}{counts.dialogues:>11}{counts.utterances:>12}{counts.labelled:>10}{gone:>10}")
        lines += [f"- {sentence}" for sentence in (*self.notes, *self.deviations)]
        for name, reason in self.left_out.items():
            lines.append(f"- left out: {name}: {reason}" + (" (known)" if name in self.known else ""))
        return "\n".join(lines)


@dataclass(frozen=True)
class Corpus:
    """The dialogues of a corpus, ready for training.

    Args:
        name: The name of the corpus.
        labels: The label set. All emotions are among its names.
        splits: Split -> dialogues. An utterance whose emotion is None is context only.
        report: What was left out, and how the counts differ from the published ones.

    Example:
        >>> turn = Utterance("call-42", "0", "A", "0.wav", emotion="sad")
        >>> splits = {"one": (Dialogue("call-42", (turn,)),), "two": ()}
        >>> corpus = Corpus("calls", LabelSet(("neutral", "sad")), splits, CorpusReport({}))
        >>> [(held_out, len(train), len(test)) for held_out, train, test in corpus.folds()]
        [('one', 0, 1), ('two', 1, 0)]
    """

    name: str
    labels: LabelSet
    splits: Mapping[str, tuple[Dialogue, ...]]
    report: CorpusReport

    def folds(self) -> Iterator[tuple[str, tuple[Dialogue, ...], tuple[Dialogue, ...]]]:
        """Leave-one-split-out: (name of the held-out split, dialogues of all others, dialogues of this one)."""
        for held_out, test in self.splits.items():
            others = (dialogues for split, dialogues in self.splits.items() if split != held_out)
            yield held_out, tuple(dialogue for dialogues in others for dialogue in dialogues), test


@dataclass(frozen=True)
class Row:
    """One utterance of the annotations.

    Args:
        dialogue_id: Unique in the whole corpus.
        utterance_id: Unique in the dialogue.
        order: The key by which rows are sorted; the dialogue comes first in it.
        speaker: May be empty.
        text: May be empty.
        emotion: The annotated one; may be empty.
        clip: The name of its audio, without suffix.
        audio: The sound file; None if it was not found.
        start_s, end_s: The part of the file, in seconds; None for the start or the end of the file.
        channel: The channel of the file, from 0; None is the mean of all channels.

    Raises:
        TypeError: A field that should be text is not.
    """

    dialogue_id: str
    utterance_id: str
    order: tuple[float | str, ...]
    speaker: str
    text: str
    emotion: str
    clip: str
    audio: Path | None
    start_s: float | None = None
    end_s: float | None = None
    channel: int | None = None

    def __post_init__(self) -> None:
        # Annotations in JSON may have any type. An error here names the file; a later one would name an utterance.
        for name in ("dialogue_id", "utterance_id", "speaker", "text", "emotion", "clip"):
            value: object = getattr(self, name)
            if not isinstance(value, str) or "\0" in value or (name.endswith("_id") and not value):
                raise TypeError(f"{name} must be text, got {value!r}")
        for name in ("dialogue_id", "utterance_id"):  # as `Utterance` keeps them
            object.__setattr__(self, name, composed(getattr(self, name)))


def assemble(
    name: str,
    labels: LabelSet,
    rows: Mapping[str, Iterable[Row]],
    *,
    own: LabelSet,
    annotated: Iterable[str],
    published: Mapping[str, Counts],
    looked_for: str,
    broken: Mapping[str, str] | None = None,
    notes: Iterable[str] = (),
) -> Corpus:
    """Make dialogues of rows: sorted, labelled, and without utterances whose audio is missing or unusable.

    Args:
        name: The name of the corpus.
        labels: The label set. Emotions become names of it; others become None.
        rows: Split -> rows in any order.
        own: The label set of the published numbers of labelled utterances.
        annotated: All emotions that the corpus is known to use; any other is noted.
        published: Split or "total" -> counts.
        looked_for: How clips are named and where they were looked for; for messages about missing audio.
        broken: "split/clip" -> why a clip of the release can't be used. These are always left out.
        notes: Irregularities that the reader found itself.

    Raises:
        CorpusError: No utterance has audio.

    Warns:
        IncompleteCorpusWarning: Clips are missing, counts differ, or labels or rows are irregular.
    """
    broken = broken or {}
    parts = {
        split: _read_split(split, in_any_order, labels, {label_keys(emotion)[0] for emotion in annotated}, broken)
        for split, in_any_order in rows.items()
    }
    if not any(part.dialogues for part in parts.values()):
        raise CorpusError(f"{name}: no utterance has audio; looked for {looked_for}")
    found = {split: part.counts for split, part in parts.items()}
    found["total"] = Counts(
        *(sum(getattr(counts, kind) for counts in found.values()) for kind in ("dialogues", "utterances", "labelled"))
    )
    if labels != own:
        published = {split: replace(counts, labelled=None) for split, counts in published.items()}
    left_out = {key: reason for part in parts.values() for key, reason in part.left_out.items()}
    all_notes = (*notes, *_notes(name, parts, looked_for))
    report = CorpusReport(found, published, left_out, frozenset(broken), all_notes)
    if not report.complete:
        warnings.warn(f"{name}: {report.summary()}", IncompleteCorpusWarning, stacklevel=3)
    return Corpus(name, labels, MappingProxyType({split: part.dialogues for split, part in parts.items()}), report)


class _Split(NamedTuple):
    """One split of a corpus.

    Attributes:
        dialogues: Those with audio.
        counts: Of the annotations, before anything is left out.
        left_out: "split/clip" -> why the utterance is not in its dialogue.
        repeated: Rows of which an earlier one has the same ids.
        unknown: Emotions neither in the label set nor known of the corpus -> how many rows have them.
    """

    dialogues: tuple[Dialogue, ...]
    counts: Counts
    left_out: dict[str, str]
    repeated: list[str]
    unknown: Counter[str]


def _read_split(
    split: str, rows: Iterable[Row], labels: LabelSet, annotated: set[str], broken: Mapping[str, str]
) -> _Split:
    """Sort and label the rows of one split, and leave out those without usable audio."""
    dialogues, repeated = _in_order(rows)
    kept: list[Dialogue] = []
    left_out: dict[str, str] = {}
    unknown: Counter[str] = Counter()
    labelled = 0
    # Checking thousands of files takes long on a network disk.
    for dialogue_id, turns in progress_bar(dialogues.items(), desc=f"checking {split}", unit="dialogue", leave=False):
        utterances = []
        for row in turns.values():
            emotion = labels.lookup(row.emotion) if row.emotion in labels else None
            labelled += emotion is not None
            if emotion is None and row.emotion and label_keys(row.emotion)[0] not in annotated:
                unknown[row.emotion] += 1
            key = f"{split}/{row.clip}"
            reason = broken.get(key) or problem_of_clip(row.audio)
            if reason or row.audio is None:
                left_out[key] = reason or ""
                continue
            utterances.append(
                Utterance(
                    dialogue_id, row.utterance_id, row.speaker.strip() or "unknown", row.audio,
                    row.start_s, row.end_s, row.text.strip() or None, emotion, row.channel,
                )
            )  # fmt: skip
        if utterances:
            kept.append(Dialogue(dialogue_id, tuple(utterances)))
    counts = Counts(len(dialogues), sum(map(len, dialogues.values())), labelled)
    return _Split(tuple(kept), counts, left_out, repeated, unknown)


def _notes(name: str, parts: Mapping[str, _Split], looked_for: str) -> Iterator[str]:
    """Irregularities of the rows of all splits, in sentences."""
    for split, part in parts.items():
        if part.repeated:
            yield (
                f"{len(part.repeated)} rows of {split} are repeated, of which the first is kept: "
                f"{_shown(part.repeated)}"
            )
    for split, part in parts.items():
        if not part.dialogues:
            yield f"the split {split} has no audio at all; looked for {looked_for}"
    if shared := _in_several({split: part.dialogues for split, part in parts.items()}):
        yield f"{len(shared)} dialogue ids are in more than one split: {_shown(shared)}"
    if unknown := sum((part.unknown for part in parts.values()), Counter()):
        counted = [f"{label!r} ({count})" for label, count in unknown.most_common()]
        yield f"emotions neither in the label set nor known of {name} were taken as unlabelled: {_shown(counted)}"


def _in_order(rows: Iterable[Row]) -> tuple[dict[str, dict[str, Row]], list[str]]:
    """(Dialogue id -> utterance id -> row, in the order spoken; the rows that repeat an earlier one)."""
    dialogues: dict[str, dict[str, Row]] = {}
    repeated: list[str] = []
    for row in sorted(rows, key=lambda row: row.order):
        turns = dialogues.setdefault(row.dialogue_id, {})
        if row.utterance_id in turns:
            repeated.append(f"{row.dialogue_id}/{row.utterance_id}")
        turns.setdefault(row.utterance_id, row)
    return dialogues, repeated


def _in_several(splits: Mapping[str, tuple[Dialogue, ...]]) -> list[str]:
    """The dialogue ids that are in more than one split, each with its splits."""
    places: dict[str, list[str]] = {}
    for split, dialogues in splits.items():
        for dialogue in dialogues:
            places.setdefault(dialogue.dialogue_id, []).append(split)
    return [f"{dialogue_id} ({' and '.join(names)})" for dialogue_id, names in places.items() if len(names) > 1]


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
