"""Dialogues of single clips."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from mal_adapter.errors import ConfigError
from mal_adapter.ser.clips.clip import Clip, ClipCorpus
from mal_adapter.ser.dialogue import Dialogue, Utterance
from mal_adapter.ser.labels import LabelSet, emotions_that_occur
from mal_adapter.ser.simulation.config import SimulationConfig
from mal_adapter.ser.simulation.mood import persistence
from mal_adapter.ser.simulation.pools import Pools
from mal_adapter.ser.simulation.simulation import Simulation
from mal_adapter.ser.simulation.splits import HOST, SPLITS, split_clips
from mal_adapter.serialization.versions import installed_version

__all__ = ["simulate"]


def simulate(
    corpora: Sequence[ClipCorpus], config: SimulationConfig | None = None, labels: LabelSet | None = None
) -> Simulation:
    """Make dialogues of single clips.

    No dialogue has a clip twice or speakers of two corpora, and no speaker is in two splits. Emotions are drawn evenly
    from those that the speaker has, apart from how they persist; speakers and clips are used about equally often.

    Args:
        corpora: With different names.
        config: The defaults are the preset "voices".
        labels: Which emotions to use, and their other names: `LabelSet(("neutral", "happy"), {"calm": "neutral"})`
            leaves out all clips that are neither. Unless given, all that occur.

    Raises:
        ConfigError: A split would have too few speakers, a label occurs nowhere, a persistence can't be had, or no
            emotion is neutral though speakers should start so.

    Example:
        >>> from pathlib import Path
        >>> clips = [
        ...     Clip(Path(f"{speaker}/{emotion}{n}.wav"), speaker, emotion, text_id=str(n))
        ...     for speaker in "ABCDEFGH"
        ...     for emotion in ("neutral", "happy", "sad")
        ...     for n in range(5)
        ... ]
        >>> config = SimulationConfig.preset("voices", dialogues=10, eval_dialogues=2, dev_share=0.3)
        >>> made = simulate([ClipCorpus("calls", tuple(clips))], config)
        >>> {split: len(dialogues) for split, dialogues in made.splits.items()}
        {'train': 10, 'dev': 2, 'test': 2}
        >>> [turn.emotion for turn in made.splits["test"][0].utterances][:2]
        ['neutral', 'neutral']
    """
    config = config or SimulationConfig()
    if len({corpus.name for corpus in corpora}) < max(1, len(corpora)):
        raise ConfigError(f"expected corpora with different names, got {[corpus.name for corpus in corpora]}")
    label_set = labels or _all_labels(corpora)
    neutral = _neutral(label_set) if config.neutral_start else None
    renamed = [replace(corpus, clips=_labelled(corpus.clips, label_set)) for corpus in corpora]
    there = {clip.emotion for corpus in renamed for clip in corpus.clips}
    if missing := [name for name in label_set if name not in there]:
        occurring = emotions_that_occur(clip.emotion for corpus in corpora for clip in corpus.clips)
        raise ConfigError(f"no clip has the label {missing[0]!r}; the emotions that occur are {', '.join(occurring)}")
    of_splits = split_clips(renamed, config)
    pools = Pools(renamed, config, label_set, neutral)
    drawn: dict[str, list[list[Clip]]] = {}
    for split in SPLITS:
        count = config.dialogues if split == "train" else config.eval_dialogues
        if count and (split == "train" or _share(split, config) > 0):
            drawn[split] = pools.dialogues(split, of_splits[split], count)
    if config.host_share:
        drawn[HOST] = [[clip] for clips in of_splits[HOST].values() for clip in clips]
        if not drawn[HOST]:
            raise ConfigError(f"the host has no speakers with host_share={config.host_share}; give it a larger share")
    made = {
        split: tuple(_dialogue(f"{split}-{number:05d}", turns) for number, turns in enumerate(dialogues))
        for split, dialogues in drawn.items()
    }
    record = {
        "mal_adapter": installed_version("mal-adapter"),
        "config": asdict(config),
        "labels": {"names": list(label_set.names), "aliases": dict(label_set.aliases)},
        "corpora": {corpus.name: _corpus_record(corpus) for corpus in corpora},
        "notes": [
            *(note for corpus in corpora for note in _unlabelled(corpus, label_set)),
            *_dropped(renamed, of_splits, config),
            *pools.notes,
        ],
        "splits": {split: _record(dialogues) for split, dialogues in made.items()},
    }
    return Simulation(made, record)


def _all_labels(corpora: Sequence[ClipCorpus]) -> LabelSet:
    names = emotions_that_occur(clip.emotion for corpus in corpora for clip in corpus.clips)
    if len(names) < 2:
        raise ConfigError(f"the emotions that occur are {list(names)}; dialogues need two or more")
    return LabelSet(names)


def _neutral(labels: LabelSet) -> str:
    if "neutral" not in labels:
        raise ConfigError(
            f"speakers should start neutral, but the labels are {', '.join(labels)}; give one of them the "
            "other name 'neutral', or start with any emotion"
        )
    return labels.lookup("neutral")


def _labelled(clips: Sequence[Clip], labels: LabelSet) -> tuple[Clip, ...]:
    return tuple(replace(clip, emotion=labels.lookup(clip.emotion)) for clip in clips if clip.emotion in labels)


def _unlabelled(corpus: ClipCorpus, labels: LabelSet) -> list[str]:
    gone = Counter(clip.emotion for clip in corpus.clips if clip.emotion not in labels)
    shown = ", ".join(f"{count} {emotion}" for emotion, count in gone.most_common())
    notes = [f"{corpus.name}: clips that have no label are left out: {shown}"] if gone else []
    if any(clip.text_id is None for clip in corpus.clips):
        notes.append(f"{corpus.name}: the sentences are not known, so one that tells the emotion may be in two splits")
    return notes


def _dropped(
    corpora: Sequence[ClipCorpus], of_splits: Mapping[str, Mapping[str, Sequence[Clip]]], config: SimulationConfig
) -> Iterator[str]:
    for corpus in corpora:
        kept = sum(len(of_corpora.get(corpus.name, ())) for of_corpora in of_splits.values())
        if gone := len(corpus.clips) - kept:
            why = "" if config.disjoint_texts else ", spoken in one emotion only,"
            yield f"{corpus.name}: {gone} clips are left out because their sentence{why} is in another split"


def _share(split: str, config: SimulationConfig) -> float:
    return config.dev_share if split == "dev" else 1.0 if config.folds else config.test_share


def _dialogue(dialogue_id: str, clips: Sequence[Clip]) -> Dialogue:
    turns = (
        Utterance(dialogue_id, str(turn), clip.speaker, clip.path, emotion=clip.emotion)
        for turn, clip in enumerate(clips)
    )
    return Dialogue(dialogue_id, tuple(turns))


def _record(dialogues: Sequence[Dialogue]) -> dict[str, Any]:
    turns = [[(turn.speaker, str(turn.emotion)) for turn in dialogue.utterances] for dialogue in dialogues]
    flat = [turn for dialogue in turns for turn in dialogue]
    kept = persistence(turns)
    counts = Counter(emotion for _, emotion in flat)
    alone = len(flat) == len(turns)
    return {
        "dialogues": len(turns),
        "utterances": len(flat),
        "clips": len({turn.audio for dialogue in dialogues for turn in dialogue.utterances}),
        "speakers": sorted({speaker for speaker, _ in flat}),
        "emotions": {emotion: counts[emotion] for emotion in sorted(counts)},
        "persistence": {name: None if alone else round(value, 4) for name, value in kept._asdict().items()},
    }


def _corpus_record(corpus: ClipCorpus) -> dict[str, Any]:
    """What a corpus had; the digest is of its clips' names and what they say, not of their sound or place."""
    names = [[clip.path.name, clip.speaker, clip.emotion, clip.text_id] for clip in corpus.clips]
    return {
        "clips": len(corpus.clips),
        "speakers": len({clip.speaker for clip in corpus.clips}),
        "digest": hashlib.sha256(json.dumps(names).encode()).hexdigest(),
        "left_out": dict(corpus.left_out),
    }
