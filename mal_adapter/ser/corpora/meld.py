"""MELD (Poria et al., 2019): dialogues from the series Friends, three splits, seven emotions, a clip per utterance."""

import os

from mal_adapter.errors import CorpusError
from mal_adapter.ser.corpora.corpus import Corpus, Counts, Row, assemble
from mal_adapter.ser.corpora.folder import Folder, read_table
from mal_adapter.ser.labels import MELD, LabelSet

__all__ = ["read_meld"]

TABLES = {"train": "train_sent_emo.csv", "dev": "dev_sent_emo.csv", "test": "test_sent_emo.csv"}
#: The CSVs' times refer to the episode and not to the clip, so they are not read.
COLUMNS = ("Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID")
#: The README gives 1039 dialogues for train; the CSV has 1038.
PUBLISHED = {"train": Counts(1038, 9989, 9989), "dev": Counts(114, 1109, 1109), "test": Counts(280, 2610, 2610)}
BROKEN = {
    "train/dia125_utt3": "the clip is damaged in the release",
    "dev/dia110_utt7": "the release has no such clip",
}


def read_meld(root: str | os.PathLike[str], labels: LabelSet = MELD) -> Corpus:
    """Read MELD: its CSVs and clips, in any folder below `root`.

    Clips are found by name, `dia{Dialogue_ID}_utt{Utterance_ID}`, as WAV, FLAC, OGG, MP3, M4A or MP4. A folder above a
    clip has to name the split: the release's `train_splits`, `dev_splits_complete` and `output_repeated_splits_test`,
    or any with the word train, dev, val or test. Each split numbers its dialogues from 0, so the ids are "train/0" and
    so on.

    Args:
        root: The folder with the CSVs and the clips.
        labels: The label set; other emotions become None.

    Returns:
        The splits train, dev and test, as far as their CSVs exist.

    Raises:
        CorpusError: There are no CSVs or no clips, or a CSV has other columns. The message says what was looked for.

    Warns:
        IncompleteCorpusWarning: A split, rows, or clips other than the two that the release lacks are missing.

    Example:
        >>> import tempfile
        >>> read_meld(tempfile.mkdtemp())
        Traceback (most recent call last):
        mal_adapter.errors.CorpusError: ...: looked for train_sent_emo.csv, dev_sent_emo.csv, test_sent_emo.csv in ...
    """
    folder = Folder(root)
    tables = folder.find(TABLES, source="MELD.Raw.tar.gz or github.com/declare-lab/MELD, data/MELD")
    clips = folder.clips(by_split=True)
    rows: dict[str, list[Row]] = {}
    for split, path in tables.items():
        rows[split] = []
        for line, cells in enumerate(read_table(path, COLUMNS), start=2):
            try:
                dialogue, utterance = int(float(cells["Dialogue_ID"])), int(float(cells["Utterance_ID"]))
            except (ValueError, OverflowError) as error:
                raise CorpusError(
                    f"{path}, row {line}: Dialogue_ID and Utterance_ID must be whole numbers, "
                    f"got {cells['Dialogue_ID']!r} and {cells['Utterance_ID']!r}"
                ) from error
            clip = f"dia{dialogue}_utt{utterance}"
            rows[split].append(
                Row(
                    f"{split}/{dialogue}", str(utterance), (dialogue, utterance), cells["Speaker"], cells["Utterance"],
                    cells["Emotion"], clip, clips.find(clip, split),
                )
            )  # fmt: skip
    return assemble(
        "MELD",
        labels,
        rows,
        own=MELD,
        annotated=(*MELD, *MELD.aliases),
        published={split: counts for split, counts in PUBLISHED.items() if split in rows},
        looked_for=f"dia0_utt0.wav, .flac, .ogg, .mp3, .m4a or .mp4 and the like in folders of {folder.root} named "
        "after the split, such as train_splits, dev_splits_complete and output_repeated_splits_test",
        broken=BROKEN,
        notes=[f"the split {split} is missing: there is no {TABLES[split]}" for split in TABLES if split not in rows],
    )
