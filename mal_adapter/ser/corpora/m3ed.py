"""M3ED (Zhao et al., 2022): two-person dialogues from Chinese TV series, splits by series, seven emotions."""

import os

from mal_adapter.errors import CorpusError
from mal_adapter.ser.corpora.corpus import Corpus, Counts, Row, assemble
from mal_adapter.ser.corpora.folder import Folder, read_json, read_lines
from mal_adapter.ser.labels import M3ED, LabelSet
from mal_adapter.ser.names import folded, natural

__all__ = ["read_m3ed"]

SERIES = {"train": "movie_list_train.txt", "dev": "movie_list_val.txt", "test": "movie_list_test.txt"}
PUBLISHED = {
    "train": Counts(utterances=17427),
    "dev": Counts(utterances=2821),
    "test": Counts(utterances=4201),
    "total": Counts(990, 24449, 24449),
}


def read_m3ed(root: str | os.PathLike[str], labels: LabelSet = M3ED) -> Corpus:
    """Read M3ED: `annotation.json`, the lists of series per split, and one clip per utterance.

    Clips are found by name in any folder below `root`: `{Speaker}_{utterance id}`, such as `A_jiayouernv_1_2.wav`. The
    release has them in `modality_speech`. Clips without samples, of which the release has twelve, are left out and
    reported.

    Args:
        root: The folder with the annotations, the lists and the clips.
        labels: The label set; other emotions (`final_main_emo`) become None.

    Returns:
        The splits train, dev and test.

    Raises:
        CorpusError: There are no annotations, lists or clips, or the format is another one.

    Warns:
        IncompleteCorpusWarning: Clips or series are missing, or the counts differ from the published ones.

    Example:
        >>> import tempfile
        >>> read_m3ed(tempfile.mkdtemp())
        Traceback (most recent call last):
        mal_adapter.errors.CorpusError: ...: looked for annotation.json in this folder and all below it, and found ...
    """
    folder = Folder(root)
    source = "github.com/AIM3-RUC/RUCM3ED"
    path = folder.find({"annotation": "annotation.json"}, source=source)["annotation"]
    lists = folder.find(SERIES, source=f"{source}, splitInfo")
    split_of = {folded(name): split for split, list_path in lists.items() for name in read_lines(list_path) if name}
    clips = folder.clips(by_split=False)
    rows: dict[str, list[Row]] = {split: [] for split in lists}
    unassigned = []
    try:
        for series, dialogues in read_json(path).items():
            split = split_of.get(folded(series))
            if split is None:
                unassigned.append(series)
                continue
            for number, dialogue in dialogues.items():
                whole = folded(number).startswith(folded(series))
                dialogue_id = number if whole else f"{series}_{number}"  # unique over all series
                for utterance_id, turn in dialogue["Dialog"].items():
                    clip = f"{turn['Speaker']}_{utterance_id}"
                    emotion = (turn.get("EmoAnnotation") or {}).get("final_main_emo") or ""
                    rows[split].append(
                        Row(
                            dialogue_id, utterance_id, (*natural(dialogue_id), *natural(utterance_id)),
                            turn["Speaker"], turn.get("Text") or "", emotion, clip, clips.find(clip),
                        )
                    )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise CorpusError(
            f"{path}: expected series -> dialogue -> Dialog -> utterance with Speaker, Text and EmoAnnotation, "
            f"got {error!r}"
        ) from error
    notes = [f"the split {split} is missing: there is no {SERIES[split]}" for split in SERIES if split not in lists]
    if unassigned:
        notes.append(f"{len(unassigned)} series are in no split: {', '.join(sorted(unassigned)[:5])}")
    return assemble(
        "M3ED",
        labels,
        rows,
        own=M3ED,
        annotated=(*M3ED, *M3ED.aliases),
        published=PUBLISHED if len(lists) == len(SERIES) else {split: PUBLISHED[split] for split in lists},
        looked_for=f"A_jiayouernv_1_1.wav and the like below {folder.root}; the release has them in modality_speech",
        notes=notes,
    )
