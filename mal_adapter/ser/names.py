"""Comparing names by their looks, not by their code points.

macOS writes é as e and an accent, other systems as one letter. Spreadsheets add byte order marks and hard spaces.
Labels, speakers, ids and files are compared by these functions only.
"""

import re
import unicodedata
from typing import Any

__all__ = ["cleaned", "composed", "composed_all", "folded", "label_keys", "natural"]

#: Characters without width: soft hyphens, zero-width spaces, marks of direction, word joiners, byte order marks.
_INVISIBLE = re.compile("[\u00ad\u034f\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]")
#: Joiners are part of the spelling after letters of Persian, Indic scripts and emoji, but not after ASCII.
_STRAY_JOINERS = re.compile("(?:^|(?<=[\x00-\x7f]))[\u200c\u200d]+")
#: Two spellings of a label may also differ in these: joiners, and selectors of an emoji's picture.
_VARIANTS = re.compile("[\u200c\u200d\ufe00-\ufe0f]")


def composed(text: str) -> str:
    """The text in Unicode's composed form (NFC), which is the same for canonically equal texts.

    Example:
        >>> composed("e\\u0301") == "\\u00e9"
        True
    """
    return unicodedata.normalize("NFC", text)


def composed_all(content: Any) -> Any:
    """A JSON value with all texts and keys in composed form; for files that other tools may have written.

    Example:
        >>> composed_all({"e\u0301": ["e\u0301", 1]}) == {"\u00e9": ["\u00e9", 1]}
        True
    """
    if isinstance(content, str):
        return composed(content)
    if isinstance(content, list):
        return list(map(composed_all, content))
    if isinstance(content, dict):
        return {composed_all(key): composed_all(value) for key, value in content.items()}
    return content


def cleaned(text: str) -> str:
    """The text as it looks: composed, without invisible characters, with single plain spaces and none at its ends.

    Example:
        >>> cleaned("\\ufeffvery\\u00a0 happy\\u200b ")
        'very happy'
    """
    return " ".join(_STRAY_JOINERS.sub("", _INVISIBLE.sub("", composed(text))).split())


def folded(text: str) -> str:
    """A key that is equal for texts that differ only in letter case or composition (Unicode's D145).

    Example:
        >>> folded("STRASSE") == folded("Stra\\u00dfe"), folded("E\\u0301") == folded("\\u00e9")
        (True, True)
    """
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", text).casefold())


def label_keys(label: str) -> tuple[str, str]:
    """The keys of an emotion: two spellings are the same emotion if they share a key.

    Letter case, composition, width (as of full-width letters), spaces at the ends and invisible characters make no
    difference. The second key is for Turkish and Azerbaijani, where the small letter of I is ı and that of İ is i.

    Example:
        >>> label_keys(" Sad") == label_keys("\\uff33\\uff21\\uff24")
        True
        >>> label_keys("KIZGIN")[1] == label_keys("kızgın")[0]
        True
    """
    seen = _VARIANTS.sub("", cleaned(unicodedata.normalize("NFKC", label)))
    turkish = seen.replace("İ", "i").replace("I", "ı").replace("i\u0307", "i")
    return folded(seen), folded(turkish)


def natural(text: str) -> tuple[float | str, ...]:
    """A key that sorts numbers in names by value: a2 before a10. Text and numbers alternate, so keys compare.

    Example:
        >>> sorted(["a10", "a2"], key=natural)
        ['a2', 'a10']
    """
    return tuple(float(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", text)))
