"""Small sound files with the published names of corpora of single clips."""

from pathlib import Path

import numpy as np
import soundfile

RAVDESS_EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fear", "disgust", "surprise")


def make_sound(path: Path, value: float = 0.1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(160, value), 16_000)
    return path


def make_ravdess(root: Path, actors: int = 24) -> Path:
    """Of each actor two repetitions of two sentences in eight emotions; strongly, too, but for neutral."""
    for actor in range(1, actors + 1):
        for emotion in range(1, 9):
            for strength in (1,) if emotion == 1 else (1, 2):
                for sentence in (1, 2):
                    for take in (1, 2):
                        name = f"03-01-{emotion:02}-{strength:02}-{sentence:02}-{take:02}-{actor:02}.wav"
                        make_sound(root / f"Actor_{actor:02}" / name)
    return root


def make_savee(root: Path) -> Path:
    """All four speakers, and of each emotion nine sentences of its own."""
    for speaker in ("DC", "JE", "JK", "KL"):
        for emotion in ("a", "d", "f", "h", "n", "sa", "su"):
            for sentence in range(1, 10):
                make_sound(root / speaker / f"{emotion}{sentence:02}.wav")
    return root
