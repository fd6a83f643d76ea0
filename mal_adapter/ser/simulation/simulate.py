"""Dialogues of single clips."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from random import Random
from typing import Any

from mal_adapter.errors import ConfigError
from mal_adapter.ser.clips.clip import Clip, ClipCorpus
from mal_adapter.ser.dialogue import Dialogue, Utterance
from mal_adapter.ser.labels import LabelSet, emotions_that_occur
from mal_adapter.ser.simulation.config import SimulationConfig
from mal_adapter.ser.simulation.draw import Pool, clips_needed
from mal_adapter.ser.simulation.mood import Mood, fitted, persistence
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
        ConfigError: A split would have too few speakers, a persistence can't be had, or no emotion is neutral though
            speakers should start so.

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
    of_splits = split_clips(renamed, config)
    emotions = {corpus.name: len({clip.emotion for clip in corpus.clips}) for corpus in renamed}
    moods = {name: fitted(config, max(2, count)) for name, count in emotions.items()}
    notes = [note for corpus in renamed for note in _unlabelled(corpus, corpora, label_set)]
    made: dict[str, tuple[Dialogue, ...]] = {}
    records: dict[str, Any] = {}
    for split in SPLITS:
        count = config.dialogues if split == "train" else config.eval_dialogues
        wanted = count and (split == "train" or _share(split, config) > 0)
        pools, used = (
            _pools(of_splits[split], split, config, label_set, neutral, emotions, moods, notes) if wanted else ({}, [])
        )
        if wanted and not pools:
            raise ConfigError(_too_few(split, of_splits[split], config))
        if pools:
            drawn = _drawn(pools, used, count)
            made[split] = tuple(_dialogue(f"{split}-{n:05d}", turns) for n, turns in enumerate(drawn))
            records[split] = _record(made[split])
    if config.host_share:
        alone = [[clip] for corpus in of_splits[HOST].values() for clip in corpus]
        if not alone:
            raise ConfigError(f"the host has no speakers with host_share={config.host_share}; give it a larger share")
        made[HOST] = tuple(_dialogue(f"{HOST}-{n:05d}", turns) for n, turns in enumerate(alone))
        records[HOST] = _record(made[HOST])
    record = {
        "mal_adapter": installed_version("mal-adapter"),
        "config": asdict(config),
        "labels": {"names": list(label_set.names), "aliases": dict(label_set.aliases)},
        "corpora": {corpus.name: _corpus_record(corpus) for corpus in corpora},
        "notes": notes,
        "splits": records,
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


def _unlabelled(corpus: ClipCorpus, corpora: Sequence[ClipCorpus], labels: LabelSet) -> list[str]:
    whole = next(other for other in corpora if other.name == corpus.name)
    gone = Counter(clip.emotion for clip in whole.clips if clip.emotion not in labels)
    shown = ", ".join(f"{count} {emotion}" for emotion, count in gone.most_common())
    notes = [f"{corpus.name}: clips that have no label are left out: {shown}"] if gone else []
    if any(clip.text_id is None for clip in corpus.clips):
        notes.append(f"{corpus.name}: the sentences are not known, so one that tells the emotion may be in two splits")
    return notes


def _share(split: str, config: SimulationConfig) -> float:
    return config.dev_share if split == "dev" else 1.0 if config.folds else config.test_share


def _pools(
    of_corpora: Mapping[str, Sequence[Clip]],
    split: str,
    config: SimulationConfig,
    labels: LabelSet,
    neutral: str | None,
    of_corpus: Mapping[str, int],
    moods: Mapping[str, Mood],
    notes: list[str],
) -> tuple[dict[str, Pool], list[int]]:
    """The pool of each corpus with enough speakers in a split, and its number of clips. Notes those without."""
    pools: dict[str, Pool] = {}
    sizes: list[int] = []
    for name, clips in of_corpora.items():
        count = Counter(clip.speaker for clip in clips)
        has: defaultdict[str, set[str]] = defaultdict(set)
        for clip in clips:
            has[clip.speaker].add(clip.emotion)
        # A voice that has few of the emotions would tell them.
        speakers = {who for who in count if count[who] >= clips_needed(config) and len(has[who]) > of_corpus[name] / 2}
        if few := len(count) - len(speakers):
            notes.append(
                f"{split}: {few} speakers of {name} have fewer than {clips_needed(config)} clips, or half of the "
                "emotions or fewer, and are left out"
            )
        if len(speakers) < config.speakers:
            notes.append(f"{split} has no dialogues of {name}, which has {len(speakers)} speakers for it")
            continue
        enough = [clip for clip in clips if clip.speaker in speakers]
        chance = Random(f"{config.seed}/{split}/{name}")
        pools[name] = Pool(enough, config, list(labels), neutral, moods[name], chance)
        sizes.append(len(enough))
    return pools, sizes


def _too_few(split: str, of_corpora: Mapping[str, Sequence[Clip]], config: SimulationConfig) -> str:
    speakers = {name: len({clip.speaker for clip in clips}) for name, clips in of_corpora.items()}
    shown = ", ".join(f"{count} of {name}" for name, count in speakers.items()) or "none"
    return (
        f"{split} has no corpus with {config.speakers} speakers for a dialogue (and {clips_needed(config)} clips of "
        f"each): it has {shown}; give it a larger share, use fewer folds, speakers or turns per dialogue, or set "
        + (
            "eval_dialogues to 0"
            if split == "test"
            else "dev_share to 0"
            if split == "dev"
            else "smaller shares of others"
        )
    )


def _drawn(pools: Mapping[str, Pool], sizes: Sequence[int], count: int) -> list[list[Clip]]:
    """Dialogues of all corpora in turn, each as often as it has clips."""
    shares = {name: size / sum(sizes) for name, size in zip(pools, sizes, strict=True)}
    made: Counter[str] = Counter()
    dialogues = []
    for number in range(1, count + 1):
        name = max(pools, key=lambda name: shares[name] * number - made[name])
        made[name] += 1
        dialogues.append(pools[name].draw())
    return dialogues


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
