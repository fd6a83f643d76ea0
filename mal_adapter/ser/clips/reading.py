"""Reading the clips of a folder by the names of their files."""

import filecmp
import os
import warnings
from collections.abc import Callable
from pathlib import Path

from mal_adapter.errors import CorpusError, IncompleteCorpusWarning
from mal_adapter.ser.clips.clip import Clip, ClipCorpus
from mal_adapter.ser.clips.pattern import compiled_pattern
from mal_adapter.ser.clips.schemes import SCHEMES, Scheme
from mal_adapter.ser.corpora.folder import SUFFIXES, Folder, problem_of_clip
from mal_adapter.ser.names import cleaned, composed, folded
from mal_adapter.ser.progress import progress_bar

__all__ = ["read_clips", "read_pattern"]

#: What a name says: the clip, and a key that copies of it share; or why it is none, and whether that is expected.
_Found = tuple[Clip, object] | tuple[str, bool]


def read_clips(name: str, root: str | os.PathLike[str]) -> ClipCorpus:
    """Read a published corpus of single clips by the names of its files, in any folder below `root`.

    Args:
        name: "ravdess", "cremad", "emodb", "tess", "savee" or "esd".
        root: The folder into which the corpus was unpacked.

    Returns:
        The clips, and which files are none. Of copies of a clip (some downloads have every file twice) one is kept.

    Raises:
        CorpusError: The name is not known, or no file has a name of this corpus.

    Warns:
        IncompleteCorpusWarning: Files can't be read, or have names that the corpus does not use.

    Example:
        >>> import tempfile
        >>> read_clips("emodb", tempfile.mkdtemp())
        Traceback (most recent call last):
        mal_adapter.errors.CorpusError: ...: looked for sound files such as 03a01Fa.wav in this folder and all below ...
    """
    scheme = SCHEMES.get(name.casefold().replace("-", ""))
    if scheme is None:
        raise CorpusError(f"there is no corpus of clips {name!r}; known are {', '.join(SCHEMES)}, and any by a pattern")
    corpus = name.casefold().replace("-", "")
    return _read(corpus, Folder(root), scheme.example, lambda path, below: _by_scheme(corpus, scheme, path, below))


def read_pattern(root: str | os.PathLike[str], pattern: str, name: str | None = None) -> ClipCorpus:
    """Read a folder of clips whose paths tell the speaker and the emotion.

    Args:
        root: The folder.
        pattern: The path of each file below it, as `{speaker}/{emotion}_{text}.wav`; see
            `mal_adapter.ser.clips.pattern.compiled_pattern`. `{sex}` may be f or m, female or male, in any letter case.
        name: The name of the corpus; that of the folder unless given.

    Returns:
        The clips, and which sound files do not fit.

    Raises:
        ConfigError: The pattern is not one.
        CorpusError: No file fits.

    Warns:
        IncompleteCorpusWarning: Sound files can't be read or do not fit.

    Example:
        >>> import tempfile, soundfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "Anna").mkdir()
        >>> soundfile.write(folder / "Anna" / "sad_01.wav", [0.1] * 160, 16_000)
        >>> read_pattern(folder, "{speaker}/{emotion}_{text}.wav", "calls").clips[0].speaker
        'calls-Anna'
    """
    expression = compiled_pattern(pattern)
    folder = Folder(root)
    corpus = name or composed(folder.root.resolve().name) or "clips"

    def by_pattern(path: Path, below: str) -> _Found:
        match = expression.fullmatch(below)
        if match is None:
            return f"its path is not like {pattern}", False
        parts = {part: cleaned(text) for part, text in match.groupdict().items()}
        if not (parts["speaker"] and parts["emotion"]):
            return "the speaker or the emotion is blank", False
        sex = parts.get("sex", "").casefold()
        if sex and sex not in ("f", "m", "female", "male"):
            return f"the sex is {sex!r}, expected f or m, female or male", False
        clip = Clip(
            path, f"{corpus}-{parts['speaker']}", parts["emotion"], sex[:1] or None, parts.get("text"),
            parts.get("intensity"),
        )  # fmt: skip
        return clip, below

    return _read(corpus, folder, pattern, by_pattern)


def _by_scheme(corpus: str, scheme: Scheme, path: Path, below: str) -> _Found:
    stem = below.removesuffix(path.suffix)
    parts = scheme.parse(stem)
    if parts is None:
        return f"its name is not like {scheme.example}", False
    if broken := scheme.broken.get(folded(path.stem)):
        return broken, True
    if problem := scheme.problem(parts, tuple(below.split("/")[:-1])):
        return problem
    speaker = scheme.speaker(parts)
    # Letters are names of people or groups, written in capitals.
    clip = Clip(
        path, f"{corpus}-{speaker.upper()}", scheme.emotions[scheme.emotion(parts)], scheme.sex(parts),
        scheme.text_id(parts), scheme.intensity(parts),
    )  # fmt: skip
    return clip, (speaker, *sorted((part, text) for part, text in parts.items() if part != "speaker"))


def _read(corpus: str, folder: Folder, example: str, find: Callable[[Path, str], _Found]) -> ClipCorpus:
    """The clips of all sound files below a folder.

    Args:
        find: (file, its path below the folder) -> what its name says.
    """
    clips: dict[object, Clip] = {}
    left_out: dict[str, str] = {}
    known: set[str] = set()
    # Of a clip in several formats the one that soundfile reads best, as for other corpora.
    sounds = sorted(folder.sounds(), key=lambda path: SUFFIXES.index(path.suffix.casefold()))
    for path in progress_bar(sounds, desc=f"reading {corpus}", unit="clip", leave=False):
        below = composed(path.relative_to(folder.root).as_posix())
        first, second = find(path, below)
        reason, expected = (first, bool(second)) if isinstance(first, str) else (problem_of_clip(path), False)
        if reason is None and isinstance(first, Clip):
            kept = clips.setdefault(second, first)
            if kept is first:
                continue
            where = composed(kept.path.relative_to(folder.root).as_posix())
            # Another format of a clip is a copy, too.
            expected = kept.path.suffix.casefold() != path.suffix.casefold() or filecmp.cmp(kept.path, path, False)
            reason = f"it is a copy of {where}" if expected else f"it has the name of {where}, but other sound"
        left_out[below] = reason or ""
        if expected:
            known.add(below)
    if not clips:
        such = f", such as {next(iter(left_out))}" if left_out else ""
        raise CorpusError(
            f"{folder.root}: looked for sound files such as {example} in this folder and all below it, and found none "
            f"({len(sounds)} other sound files are there{such})"
        )
    found = sorted(clips.values(), key=lambda clip: clip.path.relative_to(folder.root).as_posix())
    result = ClipCorpus(corpus, tuple(found), dict(sorted(left_out.items())), frozenset(known))
    if set(left_out) - known:
        warnings.warn(f"{corpus}: {result.summary()}", IncompleteCorpusWarning, stacklevel=3)
    return result
