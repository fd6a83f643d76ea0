"""Your own corpus: JSONL manifests, one per split."""

import os
from pathlib import Path

from mal_adapter.errors import CorpusError
from mal_adapter.ser.corpora.corpus import Corpus, Row, assemble
from mal_adapter.ser.corpora.folder import files_in
from mal_adapter.ser.dialogue import read_manifest
from mal_adapter.ser.labels import LabelSet, emotions_that_occur
from mal_adapter.ser.names import composed, natural
from mal_adapter.ser.paths import existing_path

__all__ = ["read_manifests"]


def read_manifests(path: str | os.PathLike[str], labels: LabelSet | None = None) -> Corpus:
    """Read a manifest, or a folder with one per split: `train.jsonl`, `dev.jsonl`, …

    Args:
        path: A `.jsonl` file, which is one split, or a folder of such files.
        labels: The label set; other emotions become None and are noted. Unless given, the emotions that occur, in
            alphabetical order.

    Returns:
        The splits, named like the files: first train, dev and test, then others in natural order (fold2 before fold10).

    Raises:
        ManifestError: A manifest has a wrong line.
        CorpusError: There is no manifest, no audio, or without `labels` fewer than two emotions.

    Warns:
        IncompleteCorpusWarning: Sound files are missing, or emotions that are not in `labels` occur.

    Example:
        >>> import tempfile, soundfile
        >>> from mal_adapter.ser.dialogue import Dialogue, Utterance, write_manifest
        >>> folder = Path(tempfile.mkdtemp())
        >>> soundfile.write(folder / "0.wav", [0.1] * 160, 16_000)
        >>> turn = Utterance("call-42", "0", "A", folder / "0.wav", emotion="sad")
        >>> write_manifest([Dialogue("call-42", (turn,))], folder / "train.jsonl")
        >>> read_manifests(folder, LabelSet(("neutral", "sad"))).splits["train"][0].utterances[0].emotion
        'sad'
    """
    path = existing_path(Path(path))
    if path.is_dir():
        files = {composed(file.stem): file for file in files_in(path, ".jsonl")}
        if not files:
            raise CorpusError(f"{path}: looked for *.jsonl in this folder, such as train.jsonl, and found none")
    else:
        files = {composed(path.stem): path}
    first = ("train", "dev", "test")
    dialogues = {
        split: read_manifest(files[split])
        for split in sorted(
            files, key=lambda s: (first.index(s.lower()) if s.lower() in first else len(first), natural(s))
        )
    }
    if labels is None:
        turns = (turn for split in dialogues.values() for dialogue in split for turn in dialogue.utterances)
        names = emotions_that_occur(turn.emotion for turn in turns)
        if len(names) < 2:
            raise CorpusError(
                f"{path}: the emotions that occur are {list(names)}; give the label set, which needs two or more"
            )
        labels = LabelSet(names)
    rows = {
        split: [
            Row(
                dialogue.dialogue_id, turn.utterance_id, (number, position), turn.speaker, turn.text or "",
                turn.emotion or "", f"{dialogue.dialogue_id}/{turn.utterance_id}", turn.audio, turn.start_s, turn.end_s,
                turn.channel,
            )
            for number, dialogue in enumerate(in_split)
            for position, turn in enumerate(dialogue.utterances)
        ]
        for split, in_split in dialogues.items()
    }  # fmt: skip
    name, looked_for = composed(path.stem), f"the files that {path} names"
    return assemble(name, labels, rows, own=labels, annotated=(), published={}, looked_for=looked_for)
