"""Readers of corpora. Each returns dialogues per split, and a report of what is missing.

from mal_adapter.ser.corpora import read_corpus
corpus = read_corpus("meld", "MELD.Raw")
print(corpus.report)
"""

import os
from collections.abc import Callable

from mal_adapter.errors import CorpusError
from mal_adapter.ser.corpora.corpus import Corpus, CorpusReport, Counts
from mal_adapter.ser.corpora.emorynlp import read_emorynlp
from mal_adapter.ser.corpora.iemocap import read_iemocap
from mal_adapter.ser.corpora.m3ed import read_m3ed
from mal_adapter.ser.corpora.manifests import read_manifests
from mal_adapter.ser.corpora.meld import read_meld
from mal_adapter.ser.labels import LabelSet

__all__ = [
    "READERS",
    "Corpus",
    "CorpusReport",
    "Counts",
    "read_corpus",
    "read_emorynlp",
    "read_iemocap",
    "read_m3ed",
    "read_manifests",
    "read_meld",
]

#: The corpora that `read_corpus` knows by name.
READERS: dict[str, Callable[..., Corpus]] = {
    "meld": read_meld,
    "iemocap": read_iemocap,
    "emorynlp": read_emorynlp,
    "m3ed": read_m3ed,
}


def read_corpus(
    name: str | os.PathLike[str], root: str | os.PathLike[str] | None = None, labels: LabelSet | None = None
) -> Corpus:
    """Read a corpus by its name, or manifests by their path.

    Args:
        name: "meld", "iemocap", "emorynlp" or "m3ed", each with `root`; or, without `root`, the path of a manifest or
            of a folder of manifests.
        root: The folder of the corpus.
        labels: The corpus's own label set unless given; for IEMOCAP that of four classes.

    Raises:
        CorpusError: The name is not known, the corpus needs `root`, or can't be read from it.
        ManifestError: A manifest has a wrong line.

    Example:
        >>> read_corpus("mled", "MELD.Raw")
        Traceback (most recent call last):
        mal_adapter.errors.CorpusError: there is no corpus 'mled'; known are meld, iemocap, emorynlp and m3ed, ...
    """
    reader = READERS.get(os.fspath(name).casefold())
    if root is None:
        if reader is not None and not os.path.exists(name):
            raise CorpusError(f"{os.fspath(name)} needs the folder into which the corpus was unpacked as 'root'")
        return read_manifests(name, labels)
    if reader is None:
        raise CorpusError(
            f"there is no corpus {os.fspath(name)!r}; known are meld, iemocap, emorynlp and m3ed, "
            "and the path of a manifest without a root"
        )
    return reader(root) if labels is None else reader(root, labels)
