"""Emotion labels: closed sets of names."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from mal_adapter.errors import LabelError
from mal_adapter.ser.scoring import LabelScorer

__all__ = ["DEMO", "EMORYNLP", "IEMOCAP_4", "IEMOCAP_6", "M3ED", "MELD", "LabelScorer", "LabelSet"]


@dataclass(frozen=True)
class LabelSet:
    """The answers a recogniser may give, and the other names by which corpora call them.

    Args:
        names: at least two, in the order of every probability vector.
        aliases: other name -> name. This is also how classes are merged: `{"hap": "happy", "exc": "happy"}`.

    Raises:
        LabelError: fewer than two names, an empty or repeated name, or an alias that leads nowhere or hides a name.

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
        if isinstance(names, str):  # a string is a sequence of strings too, but surely not meant
            raise LabelError(f"the names must be a sequence of strings, got the single string {names!r}")
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "aliases", dict(self.aliases))
        for name in (*self.names, *self.aliases):
            if not isinstance(name, str) or not name.strip():
                raise LabelError(f"a label must be a non-empty string, got {name!r}")
        if len(self.names) < 2:
            raise LabelError(f"a label set needs at least two names to choose from, got {list(self.names)}")
        known: dict[str, str] = {}
        for name in self.names:
            if _key(name) in known:
                raise LabelError(f"{name!r} and {known[_key(name)]!r} are the same label; case makes no difference")
            known[_key(name)] = name
        for alias, name in self.aliases.items():
            if name not in self.names:
                raise LabelError(f"alias {alias!r} leads to {name!r}; expected one of {', '.join(self.names)}")
            if known.get(_key(alias), name) != name:
                raise LabelError(f"alias {alias!r} leads to {name!r}, but stands for {known[_key(alias)]!r} already")
            known[_key(alias)] = name
        object.__setattr__(self, "_known", known)

    def lookup(self, label: str) -> str:
        """The name that `label` stands for; case and surrounding space make no difference.

        Raises:
            LabelError: it is neither a name nor an alias. The message lists both.
        """
        known: dict[str, str] = self._known  # type: ignore[attr-defined]
        try:
            return known[_key(label)]
        except KeyError:
            also = f" (also known: {', '.join(self.aliases)})" if self.aliases else ""
            raise LabelError(f"unknown label {label!r}; the labels are {', '.join(self.names)}{also}") from None

    def index(self, label: str) -> int:
        """The position of `lookup(label)` in `names`."""
        return self.names.index(self.lookup(label))

    def __contains__(self, label: str) -> bool:
        return _key(label) in self._known  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _key(label: str) -> str:
    return label.strip().casefold()


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

#: The usual four classes of IEMOCAP: excited counts as happy, everything else is left out.
IEMOCAP_4 = LabelSet(
    ("neutral", "happy", "angry", "sad"),
    {
        "neu": "neutral", "hap": "happy", "exc": "happy", "ang": "angry", "sad": "sad",
        "happiness": "happy", "excited": "happy", "excitement": "happy", "anger": "angry", "sadness": "sad",
    },
)  # fmt: skip

#: The six classes of IEMOCAP in work on conversations: excited and frustrated stand for themselves.
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
