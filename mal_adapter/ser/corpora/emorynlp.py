"""EmoryNLP (Zahiri and Choi, 2018): scenes from the series Friends, three splits, seven emotions."""

import ast
import contextlib
import os
import re
from pathlib import Path
from typing import Any

from mal_adapter.errors import CorpusError
from mal_adapter.ser.corpora.corpus import Corpus, Counts, Row, assemble
from mal_adapter.ser.corpora.folder import Clips, Folder, clean_text, read_json, read_table
from mal_adapter.ser.labels import EMORYNLP, LabelSet

__all__ = ["read_emorynlp"]

TABLES = {"train": "emorynlp_train_final.csv", "dev": "emorynlp_dev_final.csv", "test": "emorynlp_test_final.csv"}
ORIGINALS = {
    "train": "emotion-detection-trn.json", "dev": "emotion-detection-dev.json", "test": "emotion-detection-tst.json",
}  # fmt: skip
#: The CSVs' times refer to the episode and not to the clip, so they are not read.
COLUMNS = ("Utterance", "Speaker", "Emotion", "Scene_ID", "Utterance_ID", "Season", "Episode")
#: Scenes and utterances of the JSON files, from their README. The CSVs have a part of them; no counts are published.
PUBLISHED = {"train": Counts(713, 9934, 9934), "dev": Counts(99, 1344, 1344), "test": Counts(85, 1328, 1328)}

_ID = re.compile(r"s(\d+)_e(\d+)_c(\d+)_u(\d+)")


def read_emorynlp(root: str | os.PathLike[str], labels: LabelSet = EMORYNLP) -> Corpus:
    """Read EmoryNLP: MELD's CSVs of it, or else the original JSON files, and the clips that were cut for the CSVs.

    Clips are found by name in any folder below `root`: `sea{Season}_ep{Episode}_sc{Scene_ID}_utt{Utterance_ID}`, as
    WAV, FLAC, OGG, MP3, M4A or MP4. A scene is a dialogue. Ids are those of the JSON files, "s01_e02_c03" for a
    dialogue. With the JSON files, utterances without a clip are left out and reported.

    Args:
        root: The folder with the annotations and the clips.
        labels: The label set; other emotions become None.

    Returns:
        The splits train, dev and test, as far as their annotations exist.

    Raises:
        CorpusError: There are no annotations or no clips, or the format is another one. The message says what was
            looked for.

    Warns:
        IncompleteCorpusWarning: A split or clips are missing, or the counts differ from the published ones.

    Example:
        >>> import tempfile
        >>> read_emorynlp(tempfile.mkdtemp())
        Traceback (most recent call last):
        mal_adapter.errors.CorpusError: ...: looked for emorynlp_train_final.csv, emorynlp_dev_final.csv, ...
    """
    folder = Folder(root)
    names = {**TABLES, **{f"{split} (original)": name for split, name in ORIGINALS.items()}}
    found = folder.find(names, source="github.com/declare-lab/MELD, data/emorynlp, or github.com/emorynlp")
    clips = folder.clips(by_split=False)  # the splits have different episodes, so no name is in two
    from_tables = any(split in found for split in TABLES)
    rows: dict[str, list[Row]] = {}
    for split in TABLES:
        path = found.get(split if from_tables else f"{split} (original)")
        if path is not None:
            rows[split] = _from_table(path, clips) if from_tables else _from_json(path, clips)
    wanted = TABLES if from_tables else ORIGINALS
    return assemble(
        "EmoryNLP",
        labels,
        rows,
        own=EMORYNLP,
        annotated=EMORYNLP,
        published={} if from_tables else {split: counts for split, counts in PUBLISHED.items() if split in rows},
        looked_for=f"sea1_ep2_sc1_utt1.wav, .flac, .ogg, .mp3, .m4a or .mp4 and the like below {folder.root}",
        notes=[f"the split {split} is missing: there is no {wanted[split]}" for split in wanted if split not in rows],
    )


def _from_table(path: Path, clips: Clips) -> list[Row]:
    rows = []
    for line, cells in enumerate(read_table(path, COLUMNS), start=2):
        try:
            numbers = [int(float(cells[name])) for name in ("Season", "Episode", "Scene_ID", "Utterance_ID")]
        except (ValueError, OverflowError) as error:
            raise CorpusError(
                f"{path}, row {line}: Season, Episode, Scene_ID and Utterance_ID must be whole numbers"
            ) from error
        rows.append(_row(numbers, _speaker(cells["Speaker"]), cells["Utterance"], cells["Emotion"], clips))
    return rows


def _from_json(path: Path, clips: Clips) -> list[Row]:
    rows = []
    try:
        for episode in read_json(path)["episodes"]:
            for scene in episode["scenes"]:
                for turn in scene["utterances"]:
                    match = _ID.fullmatch(turn["utterance_id"])
                    if match is None:
                        raise CorpusError(
                            f"{path}: expected an id such as s01_e02_c01_u002, got {turn['utterance_id']!r}"
                        )
                    numbers = [int(number) for number in match.groups()]
                    text, emotion = turn.get("transcript") or "", turn.get("emotion") or ""
                    rows.append(_row(numbers, _speaker(turn.get("speakers")), clean_text(text), emotion, clips))
    except (KeyError, TypeError, AttributeError) as error:
        raise CorpusError(
            f"{path}: expected episodes with scenes with utterances with utterance_id, speakers, transcript and "
            f"emotion: {error!r}"
        ) from error
    return rows


def _row(numbers: list[int], speaker: str, text: str, emotion: str, clips: Clips) -> Row:
    season, episode, scene, utterance = numbers
    clip = f"sea{season}_ep{episode}_sc{scene}_utt{utterance}"
    dialogue_id = f"s{season:02d}_e{episode:02d}_c{scene:02d}"
    order = tuple(float(number) for number in numbers)
    return Row(dialogue_id, f"u{utterance:03d}", order, speaker, text, emotion, clip, clips.find(clip))


def _speaker(given: Any) -> str:
    """The names in a list, or in a list written as text, as in the CSVs."""
    names = given
    if isinstance(given, str):
        with contextlib.suppress(ValueError, SyntaxError):  # a plain name is used as it is
            names = ast.literal_eval(given)
    return ", ".join(str(name) for name in names) if isinstance(names, list) else str(given or "")
