"""Small corpora of made voices, in the layouts of the real ones."""

import csv
import shutil
from pathlib import Path

from tests.ser.training_world import make_dialogues

MELD_COLUMNS = ["Sr No.", "Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID", "Season"]
MELD_COLUMNS += ["Episode", "StartTime", "EndTime"]
IN_MELD = {"happy": "joy", "angry": "anger", "sad": "sadness", "neutral": "neutral"}
IN_IEMOCAP = {"happy": "exc", "angry": "ang", "sad": "sad", "neutral": "neu"}


def make_meld(root: Path, lengths: dict[str, tuple[int, ...]]) -> Path:
    """A CSV per split, and clips named by numbers."""
    for split, turns in lengths.items():
        clips = root / f"{split}_splits"
        clips.mkdir(parents=True)
        with (root / f"{split}_sent_emo.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(MELD_COLUMNS)
            spoken = make_dialogues(root / "voices" / split, turns, "test" if split == "test" else "train")
            for d, dialogue in enumerate(spoken):
                for u, turn in enumerate(dialogue.utterances):
                    shutil.copy(turn.audio, clips / f"dia{d}_utt{u}.wav")
                    times = ["00:00:01,000", "00:00:02,450"]
                    emotion = IN_MELD[turn.emotion or ""]
                    table.writerow([1, "Oh.", turn.speaker, emotion, "neutral", d, u, 1, 1, *times])
    return root


def make_iemocap(root: Path, sessions: int, lengths: tuple[int, ...]) -> Path:
    """A file of evaluations per dialogue, and a folder of its sentences."""
    for number in range(1, sessions + 1):
        session = root / f"Session{number}"
        spoken = make_dialogues(root / "voices" / str(number), lengths, ("train", "dev", "test", "host")[number % 4])
        for d, dialogue in enumerate(spoken, start=1):
            name = f"Ses{number:02d}F_impro{d:02d}"
            sentences = session / "sentences" / "wav" / name
            sentences.mkdir(parents=True)
            lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]"]
            for u, turn in enumerate(dialogue.utterances):
                sentence = f"{name}_{'FM'['AB'.index(turn.speaker)]}{u:03d}"
                shutil.copy(turn.audio, sentences / f"{sentence}.wav")
                times = f"[{1.5 * u:.4f} - {1.5 * u + 1.45:.4f}]"
                lines.append(f"{times}\t{sentence}\t{IN_IEMOCAP[turn.emotion or '']}\t[2.5000, 2.5000, 2.5000]")
            evaluations = session / "dialog" / "EmoEvaluation"
            evaluations.mkdir(parents=True, exist_ok=True)
            (evaluations / f"{name}.txt").write_text("\n\n".join(lines) + "\n")
    return root
