"""Checks of dialogues before training and evaluation: ids, labels, files and speakers. Nothing is run or decoded."""

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from mal_adapter.errors import (
    AudioError,
    ConfigError,
    LabelError,
    MalAdapterError,
    SessionError,
    SharedSpeakersWarning,
    UninformativeDataWarning,
)
from mal_adapter.ser.dialogue import Dialogue, Utterance
from mal_adapter.ser.labels import LabelSet
from mal_adapter.ser.names import cleaned
from mal_adapter.ser.paths import paths_alike
from mal_adapter.stores.base import encode_session_id

__all__ = [
    "id_problems",
    "label_problems",
    "missing_sounds",
    "sound_problems",
    "warn_of_no_past",
    "warn_of_shared_speakers",
]

_SHOWN = 3  # examples in a message


def id_problems(
    dialogues: Sequence[object], what: str = "", *, reads_memory: bool = True, needed: bool = False
) -> list[MalAdapterError]:
    """The errors for which dialogues can't be run side by side.

    Args:
        dialogues: Should be a list of `Dialogue`.
        what: What the messages call them, such as "training".
        reads_memory: Whether their ids are used as ids of sessions.
        needed: Whether an empty list is an error.

    Example:
        >>> turns = (Utterance("call-42", "0", "A", "0.wav"),)
        >>> id_problems([Dialogue("call-42", turns)] * 2, "dev")
        [ConfigError("two dev dialogues have the id 'call-42'; give them different ids")]
    """
    named = _named(what)
    if needed and not dialogues:
        return [ConfigError(f"there are no {named}")]
    if strange := [item for item in dialogues if not isinstance(item, Dialogue)]:
        given = type(strange[0]).__name__
        return [ConfigError(f"the {named} hold a {given}; give a list of Dialogue, such as corpus.splits['train']")]
    counts = Counter(dialogue.dialogue_id for dialogue in dialogues if isinstance(dialogue, Dialogue))
    repeated = [repr(name) for name, count in counts.items() if count > 1]
    problems: list[MalAdapterError] = []
    if repeated:
        problems.append(ConfigError(f"two {named} have the id {_some(repeated)}; give them different ids"))
    if reads_memory:
        for name in counts:
            try:
                encode_session_id(name)
            except SessionError as error:
                problems.append(error)
                break
    return problems


def label_problems(dialogues: Sequence[Dialogue], labels: LabelSet, what: str = "") -> list[MalAdapterError]:
    """A `LabelError` if no utterance has one of the labels. Its message lists the emotions that occur."""
    emotions = Counter(utterance.emotion for dialogue in dialogues for utterance in dialogue.utterances)
    if any(emotion is not None and emotion in labels for emotion in emotions):
        return []
    others = [f"{emotion!r} ({count})" for emotion, count in emotions.most_common() if emotion is not None]
    found = f"their emotions are {_some(others)}" if others else "they have no emotions at all"
    return [
        LabelError(
            f"no utterance of the {_named(what)} has one of {', '.join(labels)}: {found}; label them, or choose other "
            "labels, or give aliases"
        )
    ]


def sound_problems(dialogues: Sequence[Dialogue], labels: LabelSet, what: str = "") -> list[MalAdapterError]:
    """An `AudioError` if the sound files of all labelled utterances are missing, as when a disk is not mounted."""
    paths = dict.fromkeys(utterance.audio for _, utterance in _labelled(dialogues, labels))
    if not paths or any(map(paths_alike, paths)):
        return []
    return [
        AudioError(
            f"the sound files of all labelled utterances of the {_named(what)} ({len(paths)}) are missing, such as "
            f"{_some(map(str, paths))}; "
            "check the paths and whether their disk is mounted"
        )
    ]


def missing_sounds(dialogues: Iterable[Dialogue]) -> tuple[list[Path], int]:
    """(Sound files that do not exist, number of all sound files). No file is opened."""
    paths = dict.fromkeys(utterance.audio for dialogue in dialogues for utterance in dialogue.utterances)
    return [path for path in paths if not paths_alike(path)], len(paths)


def warn_of_no_past(dialogues: Sequence[Dialogue], labels: LabelSet, what: str = "", *, stacklevel: int = 3) -> None:
    """Warn if no labelled utterance has another one before it, so that all of them read an empty memory.

    A memory that is trained on the first utterances of dialogues only never learns to read. In an evaluation on such
    utterances, it makes no difference.
    """
    places = [place for place, _ in _labelled(dialogues, labels)]
    if not places or any(places):
        return
    single = all(len(dialogue.utterances) == 1 for dialogue in dialogues)
    reason = "have one utterance each" if single else "have labels at their first utterances alone"
    warnings.warn(
        f"the {_named(what)} {reason}, so no labelled utterance has a past that a memory could hold; give whole "
        "conversations, their utterances under one dialogue_id",
        UninformativeDataWarning,
        stacklevel=stacklevel,
    )


def warn_of_shared_speakers(
    train: Sequence[Dialogue], dev: Sequence[Dialogue], host_config: object, *, stacklevel: int = 3
) -> None:
    """Warn if the same people speak in the training dialogues and in the dev dialogues or the host's training data.

    A host knows the clips that it was trained on, so it leaves a memory nothing to learn on them. On dev dialogues of
    speakers from the training, the best epoch is chosen for voices that are known.

    Speakers are compared by name. Single letters, and names that are no more than the speakers of one dialogue, such as
    agent and caller in every call, are taken for roles and not for people.

    Args:
        train: The training dialogues.
        dev: The dev dialogues; may be empty.
        host_config: Of the host. Its `training_speakers`, a list of names, are the speakers of the host's training; of
            a host without it they are not known.
        stacklevel: Of the warnings.
    """
    by_dialogue = [{u.speaker for u in d.utterances if not _is_letter(u.speaker)} for d in (*train, *dev)]
    if len(set().union(*by_dialogue)) <= max(map(len, by_dialogue), default=0):
        return
    of_train, of_dev = (set().union(*part) for part in (by_dialogue[: len(train)], by_dialogue[len(train) :]))
    known = getattr(host_config, "training_speakers", None)
    of_host = {cleaned(name) for name in known if isinstance(name, str)} if isinstance(known, (list, tuple)) else set()
    messages = []
    if shared := sorted(of_train & of_dev):
        messages.append(
            f"the training and the dev dialogues have the speakers {_some(shared)} in common, so the best epoch is "
            "chosen for voices that the memory knows; give dev dialogues of other speakers"
        )
    for what, speakers in (("training", of_train), ("dev", of_dev)):
        if shared := sorted(speakers & of_host):
            messages.append(
                f"the host was trained on the speakers {_some(shared)} of the {what} dialogues; it knows their clips, "
                "so they show little of what a memory can add; give dialogues of speakers that are new to the host"
            )
    for message in messages:
        warnings.warn(message, SharedSpeakersWarning, stacklevel=stacklevel)


def _is_letter(name: str) -> bool:
    return len(name) == 1 and name.isalpha()


def _labelled(dialogues: Sequence[Dialogue], labels: LabelSet) -> list[tuple[int, Utterance]]:
    """The utterances with one of the labels, each with its position in its dialogue, from 0."""
    return [
        (place, utterance)
        for dialogue in dialogues
        for place, utterance in enumerate(dialogue.utterances)
        if utterance.emotion is not None and utterance.emotion in labels
    ]


def _named(what: str) -> str:
    return f"{what} dialogues" if what else "dialogues"


def _some(texts: Iterable[str]) -> str:
    first = list(texts)
    more = len(first) - _SHOWN
    return ", ".join(first[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
