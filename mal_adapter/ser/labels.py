"""Emotion labels: closed sets of names."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from mal_adapter.errors import LabelError
from mal_adapter.ser.names import cleaned, label_keys

__all__ = [
    "DEMO",
    "EMORYNLP",
    "IEMOCAP_4",
    "IEMOCAP_6",
    "M3ED",
    "MELD",
    "LabelSet",
    "emotions_that_occur",
]


@dataclass(frozen=True)
class LabelSet:
    """The possible answers of a recogniser, and their other names in corpora.

    Names are equal if they look the same: letter case, composed or decomposed accents, full-width letters, invisible
    characters and spaces at the ends make no difference (`mal_adapter.ser.names.label_keys`).

    Args:
        names: At least two, in the order of every probability vector. They are kept in composed form (NFC), without
            invisible characters and outer spaces.
        aliases: Other name -> name. Aliases also merge classes: `{"hap": "happy", "exc": "happy"}`.

    Raises:
        LabelError: There are fewer than two names, a name is empty, repeated or unprintable, or an alias leads to no
            name or is one of another label.

    Example:
        >>> labels = LabelSet(("neutral", "happy"), aliases={"exc": "happy"})
        >>> labels.lookup("EXC"), labels.index("Neutral"), "sad" in labels, list(labels)
        ('happy', 0, False, ['neutral', 'happy'])
        >>> labels.lookup("sad")
        Traceback (most recent call last):
        mal_adapter.errors.LabelError: unknown label 'sad'; the labels are neutral, happy (also known: exc)
    """

    names: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        names: object = self.names
        if isinstance(names, str):  # a string is a sequence of strings too, but surely a mistake
            raise LabelError(f"the names must be a sequence of strings, got the single string {names!r}")
        object.__setattr__(self, "names", tuple(map(_checked, self.names)))
        if len(self.names) < 2:
            raise LabelError(f"a label set needs at least two names to choose from, got {list(self.names)}")
        known: dict[str, str] = {}
        for name in self.names:
            if (other := _found(name, known)) is not None:
                raise LabelError(
                    f"{name!a} and {other!a} are the same label; letter case, accents written as one character or two, "
                    "width and invisible characters make no difference"
                )
            known |= dict.fromkeys(label_keys(name), name)
        names = dict(known)
        aliases: dict[str, str] = {}
        for alias, given in dict(self.aliases).items():
            alias, target = _checked(alias), _found(_checked(given), names)
            if target is None:
                raise LabelError(f"alias {alias!r} leads to {given!r}; expected one of {', '.join(self.names)}")
            if (other := _found(alias, known)) not in (None, target):
                raise LabelError(f"alias {alias!r} leads to {target!r}, but is a name of {other!r} already")
            known |= dict.fromkeys(label_keys(alias), target)
            aliases[alias] = target
        object.__setattr__(self, "aliases", aliases)
        object.__setattr__(self, "_known", known)

    def lookup(self, label: str) -> str:
        """The name of the label that `label` is a name or an alias of.

        Raises:
            LabelError: `label` is neither a name nor an alias. The message lists both.
        """
        name = _found(label, self._known)  # type: ignore[attr-defined]
        if name is None:
            also = f" (also known: {', '.join(self.aliases)})" if self.aliases else ""
            raise LabelError(f"unknown label {label!r}; the labels are {', '.join(self.names)}{also}")
        return name

    def index(self, label: str) -> int:
        """The position of `lookup(label)` in `names`."""
        return self.names.index(self.lookup(label))

    def __contains__(self, label: str) -> bool:
        return _found(label, self._known) is not None  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def emotions_that_occur(emotions: Iterable[str | None]) -> tuple[str, ...]:
    """Each emotion once, in alphabetical order; for the label set of your own data.

    Args:
        emotions: The emotions of utterances; None and blank ones are left out.

    Returns:
        The most frequent spelling of each emotion.

    Example:
        >>> emotions_that_occur(["sad", None, "Happy", "sad ", "SAD", "Happy"])
        ('Happy', 'sad')
    """
    spellings: dict[str, Counter[str]] = {}
    for emotion in emotions:
        if emotion is not None and (name := cleaned(emotion)):
            keys = label_keys(name)
            group = next((spellings[key] for key in keys if key in spellings), Counter())
            group[name] += 1
            for key in keys:
                spellings.setdefault(key, group)
    return tuple(sorted({max(group, key=lambda name: (group[name], name)) for group in spellings.values()}))


def _found(label: str, known: Mapping[str, str]) -> str | None:
    return next((known[key] for key in label_keys(label) if key in known), None)


def _checked(name: str) -> str:
    """The name without invisible characters and outer spaces.

    Raises:
        LabelError: The name is not text, is empty, or has a character that can't be printed.
    """
    given: object = name
    if not isinstance(given, str) or not cleaned(given):
        raise LabelError(f"a label must be a non-empty string, got {given!r}")
    seen = cleaned(given)
    for character in seen:
        if unicodedata.category(character) in ("Cc", "Cs"):  # controls, and halves of characters that aren't UTF-8
            raise LabelError(
                f"the label {given!a} has the unprintable character U+{ord(character):04X}; write it without"
            )
    return seen


#: The classes of `mal_adapter.demo`.
DEMO = LabelSet(("neutral", "happy", "angry", "sad"))

#: MELD's seven classes, in the order of its paper (Poria et al., 2019).
MELD = LabelSet(
    ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger"),
    {
        "surprised": "surprise", "fearful": "fear", "sad": "sadness", "happy": "joy", "happiness": "joy",
        "disgusted": "disgust", "angry": "anger",
    },
)  # fmt: skip

#: The usual four classes of IEMOCAP: excited counts as happy; other emotions are left out.
IEMOCAP_4 = LabelSet(
    ("neutral", "happy", "angry", "sad"),
    {
        "neu": "neutral", "hap": "happy", "exc": "happy", "ang": "angry", "sad": "sad",
        "happiness": "happy", "excited": "happy", "excitement": "happy", "anger": "angry", "sadness": "sad",
    },
)  # fmt: skip

#: The six classes of IEMOCAP in work on conversations: excited and frustrated are classes of their own.
IEMOCAP_6 = LabelSet(
    ("happy", "sad", "neutral", "angry", "excited", "frustrated"),
    {
        "hap": "happy", "neu": "neutral", "ang": "angry", "exc": "excited", "fru": "frustrated", "happiness": "happy",
        "sadness": "sad", "anger": "angry", "excitement": "excited", "frustration": "frustrated",
    },
)  # fmt: skip

#: The seven classes of EmoryNLP (Zahiri and Choi, 2018), in the order of its tables; the six primary emotions of
#: Willcox's feeling wheel, and neutral.
EMORYNLP = LabelSet(("neutral", "joyful", "peaceful", "powerful", "scared", "mad", "sad"))

#: The seven classes of M3ED, in the order of its paper (Zhao et al., 2022).
M3ED = LabelSet(
    ("happy", "surprise", "sad", "disgust", "anger", "fear", "neutral"),
    {"surprised": "surprise", "sadness": "sad", "angry": "anger", "happiness": "happy"},
)
