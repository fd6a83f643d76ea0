"""Emotion labels: closed sets of names, and the probability a language model gives to each name as its answer."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mal_adapter.errors import LabelError
from mal_adapter.ser.names import cleaned, label_keys

__all__ = [
    "DEMO",
    "EMORYNLP",
    "IEMOCAP_4",
    "IEMOCAP_6",
    "M3ED",
    "MELD",
    "LabelScorer",
    "LabelSet",
    "emotions_that_occur",
]


@dataclass(frozen=True)
class LabelSet:
    """The answers a recogniser may give, and the other names by which corpora call them.

    Names are compared as people see them: letter case, composed or decomposed accents, full-width letters, invisible
    characters and spaces at the ends make no difference (`mal_adapter.ser.names.label_keys`).

    Args:
        names: at least two, in the order of every probability vector; kept in composed form (NFC), without invisible
            characters and outer spaces.
        aliases: other name -> name. This is also how classes are merged: `{"hap": "happy", "exc": "happy"}`.

    Raises:
        LabelError: fewer than two names, an empty, repeated or unprintable name, or an alias that leads nowhere or
            hides a name.

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
                raise LabelError(f"alias {alias!r} leads to {target!r}, but stands for {other!r} already")
            known |= dict.fromkeys(label_keys(alias), target)
            aliases[alias] = target
        object.__setattr__(self, "aliases", aliases)
        object.__setattr__(self, "_known", known)

    def lookup(self, label: str) -> str:
        """The name that `label` stands for, compared as people see it.

        Raises:
            LabelError: it is neither a name nor an alias. The message lists both.
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
    """Each emotion once, however it is spelled, in the order of the alphabet; for a label set of one's own data.

    Args:
        emotions: of utterances; None and blank ones are left out.

    Returns:
        The most frequent spelling of each.

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
    """The name as it is seen.

    Raises:
        LabelError: it is no text, empty, or has a character that can't be printed.
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


class LabelScorer:
    """Log-probabilities of a closed set of answers after one forward of the prompt.

    The probability of a label is the product over its tokens. Where one label begins with all tokens of another ("sad",
    "sadness"), the shorter would always win, so then the end of the answer is scored too, for every label.

    Args:
        tokenizer: the host's tokenizer.
        labels: the answers.
        prompt_text: what stands before the answer, as text. Labels are tokenized behind it, as in training, so that a
            merge at the boundary is seen; the last `healed_tokens` tokens of the prompt then belong to the labels.
        end_ids: the tokens that end an answer; any of them counts.

    Raises:
        LabelError: two labels have the same tokens, a label is unknown to the tokenizer, or the end has to be scored
            but is not known.
    """

    def __init__(self, tokenizer: Any, labels: LabelSet, prompt_text: str, end_ids: Sequence[int]) -> None:
        self.labels = labels
        prompt = _tokens(tokenizer, prompt_text)
        answers = [_tokens(tokenizer, prompt_text + name) for name in labels]
        common = len(prompt)
        while any(answer[:common] != prompt[:common] for answer in answers):
            common -= 1
        self.healed_tokens = len(prompt) - common
        self.token_ids = [answer[common:] for answer in answers]
        self._check(tokenizer)
        self.end_ids = list(end_ids) if self._has_prefixes() else []
        if self._has_prefixes() and not self.end_ids:
            raise LabelError(
                "one label begins with another, which can only be told apart by the end of the answer, but neither the "
                f"model nor the tokenizer has an end-of-sequence token; choose other labels than {', '.join(labels)}"
            )

    @property
    def needs_cache(self) -> bool:
        """Whether labels go on behind the token that the prompt's forward answers with."""
        return bool(self.end_ids) or any(len(ids) > 1 for ids in self.token_ids)

    def _has_prefixes(self) -> bool:
        return any(a is not b and b[: len(a)] == a for a in self.token_ids for b in self.token_ids)

    def _check(self, tokenizer: Any) -> None:
        unknown = getattr(tokenizer, "unk_token_id", None)
        by_tokens: dict[tuple[int, ...], str] = {}
        for name, ids in zip(self.labels, self.token_ids, strict=True):
            if not ids or (unknown is not None and unknown in ids):
                raise LabelError(f"the host's tokenizer has no tokens for the label {name!r}; choose another word")
            if tuple(ids) in by_tokens:
                raise LabelError(f"{name!r} and {by_tokens[tuple(ids)]!r} are the same tokens {ids} to this host")
            by_tokens[tuple(ids)] = name

    def log_probs(
        self,
        model: Any,
        prompt_logits: Float[Tensor, "batch vocabulary"],
        past_key_values: Any,
        attention_mask: Int[Tensor, "batch seq_len"],
        position_ids: Int[Tensor, "batch seq_len"] | None = None,
    ) -> Float[Tensor, "batch labels"]:
        """Log-probability of each label as the answer. Uses up the cache.

        Args:
            model: the host; called again only where a label has several tokens. That call has no audio.
            prompt_logits: (batch, vocabulary), at the last position of each prompt.
            past_key_values: the cache of the forward over the prompts; not looked at unless `needs_cache`.
            attention_mask: (batch, seq_len) of the prompts, padded on the left.
            position_ids: (batch, seq_len) as passed with the prompts; None where the host counts by itself.

        Returns:
            (batch, labels) float32, not normalised over the labels; differentiable where autograd records.
        """
        batch = attention_mask.shape[0]
        device = prompt_logits.device
        first = prompt_logits.float().log_softmax(-1)
        scores = first[:, [ids[0] for ids in self.token_ids]]

        # What has to be fed behind the prompt: all but the last token, or all where the end is scored as well.
        fed = [ids if self.end_ids else ids[:-1] for ids in self.token_ids]
        rows = [index for index, ids in enumerate(fed) if ids]
        if not rows:
            return scores
        width = max(len(fed[index]) for index in rows)
        pad = self.token_ids[0][0]  # any token that exists: padded positions are masked and come last
        ids = torch.tensor([fed[index] + [pad] * (width - len(fed[index])) for index in rows], device=device)
        mask = torch.tensor([[n < len(fed[index]) for n in range(width)] for index in rows], device=device)

        past_key_values.batch_repeat_interleave(len(rows))  # row b of the prompt becomes rows b·labels … of the answers
        prompt_mask = attention_mask.repeat_interleave(len(rows), dim=0)
        answer_mask = mask.to(prompt_mask.dtype).repeat(batch, 1)
        positions = {}
        if position_ids is not None:
            following_ids = position_ids[:, -1:] + 1 + torch.arange(width, device=position_ids.device)
            positions["position_ids"] = following_ids.repeat_interleave(len(rows), dim=0)
        logits = model(
            input_ids=ids.repeat(batch, 1),
            attention_mask=torch.cat((prompt_mask, answer_mask), dim=1),
            past_key_values=past_key_values,
            use_cache=True,
            **positions,
        ).logits
        log_probs = logits.to(device).float().log_softmax(-1).view(batch, len(rows), width, -1)

        scores = scores.clone()
        for row, index in enumerate(rows):
            for position in range(len(fed[index])):
                following = self.token_ids[index][position + 1 : position + 2] or self.end_ids
                scores[:, index] += log_probs[:, row, position, following].logsumexp(-1)
        return scores


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
