"""IEMOCAP (Busso et al., 2008): ten actors in pairs, five sessions for leave-one-session-out."""

import os
import re
from pathlib import Path

from mal_adapter.errors import CorpusError
from mal_adapter.ser.corpora.corpus import Corpus, Counts, Row, assemble
from mal_adapter.ser.corpora.folder import Clips, Folder, clean_text, existing_folder, files_in, find_below, read_lines
from mal_adapter.ser.labels import IEMOCAP_4, IEMOCAP_6, LabelSet
from mal_adapter.ser.names import natural

__all__ = ["read_iemocap"]

#: The codes of EmoEvaluation; xxx means that the annotators did not agree.
CODES = ("neu", "hap", "exc", "ang", "sad", "fru", "sur", "fea", "dis", "oth", "xxx")
SESSIONS = range(1, 6)
#: The utterances in four classes, of the 151 dialogues with 10 039 utterances in EmoEvaluation.
LABELLED_4 = {"session1": 1085, "session2": 1023, "session3": 1151, "session4": 1031, "session5": 1241, "total": 5531}
#: 595 hap, 1084 sad, 1708 neu, 1103 ang, 1041 exc, 1849 fru. Papers on conversations often give 7433, which is not the
#: number in EmoEvaluation.
LABELLED_6 = 7380

_LINE = re.compile(r"\[\s*(\d+\.?\d*)\s*-\s*(\d+\.?\d*)\s*\]\s+(Ses\w+)\s+(\w+)\s+\[")
_TRANSCRIPT = re.compile(r"(Ses\w+)\s*\[[^\]]*\]\s*:?\s*(.*)")


def read_iemocap(root: str | os.PathLike[str], labels: LabelSet = IEMOCAP_4) -> Corpus:
    """Read IEMOCAP: the labels of EmoEvaluation, the wave files of single sentences, and the transcripts.

    Clips are found by name below `sentences/wav`, as WAV, FLAC, OGG, MP3, M4A or MP4, in any letter case. Utterances
    are ordered by their start. All utterances of EmoEvaluation are kept; those with another emotion than the labels are
    context, with an emotion of None.

    Args:
        root: The folder with `Session1` to `Session5`, or the one above it.
        labels: `IEMOCAP_4` (excited counts as happy) or `IEMOCAP_6`.

    Returns:
        The splits session1 to session5; `Corpus.folds` leaves out one session at a time. The speaker is session and
        gender, such as "Ses01F".

    Raises:
        CorpusError: There are no sessions, or no clips. The message says what was looked for.

    Warns:
        IncompleteCorpusWarning: A session or clips are missing, or the counts differ from the published ones.

    Example:
        >>> import tempfile
        >>> read_iemocap(tempfile.mkdtemp())
        Traceback (most recent call last):
        mal_adapter.errors.CorpusError: ...: looked for Session1/dialog/EmoEvaluation/*.txt to Session5/..., ...
    """
    root = existing_folder(root)
    bases = [root, *sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))]
    base = next((base for base in bases if any(_evaluations(base, session) for session in SESSIONS)), None)
    if base is None:
        raise CorpusError(
            f"{root}: looked for Session1/dialog/EmoEvaluation/*.txt to Session5/... in this folder and those directly "
            "below it, and found none; they are part of IEMOCAP_full_release"
        )
    rows: dict[str, list[Row]] = {}
    notes = []
    for session in SESSIONS:
        paths = _evaluations(base, session)
        if paths:
            sentences = find_below(base, f"Session{session}", "sentences", "wav")
            clips = Clips(()) if sentences is None else Folder(sentences).clips(by_split=False)
            rows[f"session{session}"] = [row for path in paths for row in _dialogue(path, clips)]
        else:
            notes.append(f"session{session} is missing: Session{session}/dialog/EmoEvaluation has no *.txt")
    return assemble(
        "IEMOCAP",
        labels,
        rows,
        own=labels,
        annotated=CODES,
        published=_published(labels, rows) if len(rows) == len(SESSIONS) else {},
        looked_for=f"{base}/Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav and the like",
        notes=notes,
    )


def _evaluations(base: Path, session: int) -> list[Path]:
    folder = find_below(base, f"Session{session}", "dialog", "EmoEvaluation")
    return [] if folder is None else files_in(folder, ".txt")


def _dialogue(path: Path, clips: Clips) -> list[Row]:
    texts: dict[str, str] = {}
    transcript = find_below(path.parent.parent, "transcriptions", path.name)
    if transcript is not None and transcript.is_file():
        for line in read_lines(transcript):
            if match := _TRANSCRIPT.match(line):
                texts[match[1]] = clean_text(match[2])
    rows = []
    for line in read_lines(path):
        if not (match := _LINE.match(line)):
            continue  # the header, and the answers of single annotators
        start_s, end_s, name, emotion = float(match[1]), float(match[2]), match[3], match[4]
        # Ses01F_impro01_M003: the actor F wears the motion markers; the last part's letter, M, is the speaker
        speaker = f"{name[:5]}{name.rsplit('_', 1)[-1][:1]}"
        rows.append(
            Row(
                path.stem, name, (path.stem, start_s, end_s, *natural(name)), speaker, texts.get(name, ""), emotion,
                name, clips.find(name),
            )
        )  # fmt: skip
    if not rows:
        raise CorpusError(
            f"{path}: there is no line such as '[6.2901 - 8.2357]\\tSes01F_impro01_F000\\tneu\\t[2.5, 2.5, 2.5]'"
        )
    return rows


def _published(labels: LabelSet, rows: dict[str, list[Row]]) -> dict[str, Counts]:
    if labels == IEMOCAP_4:
        sessions = {split: Counts(labelled=LABELLED_4[split]) for split in rows}
        return {**sessions, "total": Counts(151, 10039, LABELLED_4["total"])}
    return {"total": Counts(151, 10039, LABELLED_6 if labels == IEMOCAP_6 else None)}
