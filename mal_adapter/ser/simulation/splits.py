"""Which speakers, and which sentences, are in which split."""

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from mal_adapter.ser.clips.clip import Clip, ClipCorpus
from mal_adapter.ser.simulation.config import SimulationConfig

__all__ = ["HOST", "SPLITS", "split_clips"]

#: The splits with dialogues, and that of a host's speakers.
SPLITS, HOST = ("train", "dev", "test"), "host"

_Item = TypeVar("_Item")


def split_clips(corpora: Sequence[ClipCorpus], config: SimulationConfig) -> dict[str, dict[str, list[Clip]]]:
    """Deal the speakers of each corpus to the splits, evenly by sex, and then the sentences, as configured.

    Returns:
        Split -> corpus -> clips. No speaker is in two splits; nor is a sentence that tells the emotion, or with
        `disjoint_texts` any sentence.
    """
    found: dict[str, dict[str, list[Clip]]] = {split: {} for split in (HOST, *SPLITS)}
    for corpus in corpora:
        # Of each corpus and purpose its own, so that corpora beside it or other shares change nothing here.
        place = _split_of_speakers(corpus, config)
        text = _split_of_texts(corpus.clips, place, config)
        for clip in corpus.clips:
            split = place[clip.speaker]
            if clip.text_id is None or text.get(clip.text_id, split) == split:
                found[split].setdefault(corpus.name, []).append(clip)
    return found


def _chance(config: SimulationConfig, *purpose: str) -> random.Random:
    return random.Random("/".join((str(config.seed), *purpose)))  # text is hashed by SHA-512, alike everywhere


def _split_of_speakers(corpus: ClipCorpus, config: SimulationConfig) -> dict[str, str]:
    sexes = {clip.speaker: clip.sex or "" for clip in corpus.clips}
    chance = _chance(config, corpus.name, "speakers")
    speakers = sorted(sexes)
    chance.shuffle(speakers)
    host, others = _dealt(_by(speakers, sexes), {HOST: config.host_share, "": 1 - config.host_share}, (HOST, ""))
    if config.folds is None:
        shares = {"test": config.test_share, "": 1 - config.test_share}
        test, others = _dealt(_by(others, sexes), shares, ("test", ""))
    else:
        folds = _dealt(_by(others, sexes), {str(n): 1 / config.folds for n in range(config.folds)})
        test = folds.pop(config.fold or 0)
        others = [speaker for fold in folds for speaker in fold]
    dev, train = _dealt(_by(others, sexes), {"dev": config.dev_share, "": 1 - config.dev_share}, ("dev", ""))
    names = ((HOST, host), ("test", test), ("dev", dev), ("train", train))
    return {speaker: split for split, members in names for speaker in members}


def _split_of_texts(clips: Iterable[Clip], place: Mapping[str, str], config: SimulationConfig) -> dict[str, str]:
    """Sentence -> the only split in which it may be; only of sentences that may not be in several."""
    emotions: defaultdict[str, set[str]] = defaultdict(set)
    splits: defaultdict[str, set[str]] = defaultdict(set)
    for clip in clips:
        if clip.text_id is not None:
            emotions[clip.text_id].add(clip.emotion)
            splits[clip.text_id].add(place[clip.speaker])
    apart = [
        text
        for text in sorted(emotions)
        if len(splits[text]) > 1 and (config.disjoint_texts or len(emotions[text]) == 1)
    ]
    _chance(config, "texts").shuffle(apart)
    shares = dict.fromkeys((HOST, *SPLITS), 0.0)
    for split in place.values():
        shares[split] += 1 / len(place)
    groups = _by(apart, {text: " ".join(sorted(emotions[text])) for text in apart})
    return {text: split for split, texts in zip(shares, _dealt(groups, shares), strict=True) for text in texts}


def _by(items: Sequence[_Item], keys: Mapping[_Item, str]) -> list[list[_Item]]:
    groups: dict[str, list[_Item]] = {key: [] for key in sorted({keys[item] for item in items})}
    for item in items:
        groups[keys[item]].append(item)
    return list(groups.values())


def _dealt(
    groups: Iterable[Sequence[_Item]], shares: Mapping[str, float], order: Sequence[str] | None = None
) -> list[list[_Item]]:
    """Deal items so that each share is met as exactly as whole numbers allow, over all groups and nearly within each.

    Returns:
        One list per share.
    """
    dealt: dict[str, list[_Item]] = {name: [] for name in order or shares}
    count = 0
    for group in groups:
        for item in group:
            count += 1
            dealt[max(dealt, key=lambda name: shares[name] * count - len(dealt[name]))].append(item)
    return list(dealt.values())
