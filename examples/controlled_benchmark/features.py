"""Log-mel features of the host's training utterances with the true values, kept as .npy files.

The features come from the host's own feature extractor on the 16-bit samples a WAV file would hold. They are cut after
the frames that the encoder's convolutions still see; see `tiny_host.audio_tokens` for why that changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tiny_host import HOP_LENGTH, MEL_BINS, build_feature_extractor
from tqdm.auto import tqdm
from transformers import WhisperFeatureExtractor

from mal_adapter.demo import voices
from mal_adapter.demo.dialogues import TURNS, SpokenDialogue, make_dialogue

__all__ = ["FRAMES", "Features", "features_of", "load_features"]

#: Valid feature frames of one utterance, and the frames kept (the first convolutions reach a little further).
FRAMES = -(-round(voices.UTTERANCE_S * voices.SAMPLING_RATE) // HOP_LENGTH)
FRAMES_KEPT = FRAMES + 3

_CHUNK = 50  # dialogues per piece of work
_FIELDS = ("mels", "labels", "speakers", "truth", "baselines", "vowels")


@dataclass(frozen=True)
class Features:
    """Log-mel features of `count` dialogues, and the true values.

    Attributes:
        mels: log-mel features, float16, (count, turns, mel_bins, FRAMES_KEPT); a read-only memory map when cached.
        labels: index into EMOTIONS, int64, (count, turns).
        speakers: 0 or 1, int64, (count, turns).
        truth: log pitch (Hz), level (dBFS) and log tract scale of each utterance, float32, (count, turns, 3).
        baselines: the same three of its speaker, float32, (count, turns, 3).
        vowels: the vowels of each utterance, strings, (count, turns).
    """

    mels: NDArray[np.float16]
    labels: NDArray[np.int64]
    speakers: NDArray[np.int64]
    truth: NDArray[np.float32]
    baselines: NDArray[np.float32]
    vowels: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.labels)


def load_features(
    split: str, seed: int, count: int, cache_folder: str | Path, turns: int = TURNS, workers: int = 2
) -> Features:
    """Features of dialogues 0 … count-1 of a split: from the cache, or made now (about 5 ms per utterance and core).

    Args:
        split, seed: as in `make_dialogue`.
        cache_folder: where the .npy files go, about 12 KB per utterance. A change of the voices or dialogues settings
            or of the feature extractor gets a new folder.
        workers: processes; 1 works in this process. More need a `__main__` guard in the calling script.
    """
    folder = Path(cache_folder) / f"features-{split}-{seed}-{count}-{turns}-{_fingerprint()}"
    if not (folder / "done").exists():
        _write_features(folder, split, seed, count, turns, workers)
    return Features(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _FIELDS})


def features_of(dialogues: list[SpokenDialogue]) -> Features:
    """The features of dialogues that are in memory; all must have the same number of turns."""
    extractor = build_feature_extractor()
    turns = [turn for dialogue in dialogues for turn in dialogue.turns]
    shape = (len(dialogues), len(dialogues[0].turns))
    speakers = [dialogue.speakers[turn.speaker] for dialogue in dialogues for turn in dialogue.turns]
    return Features(
        mels=_mels(extractor, [turn.audio for turn in turns]).reshape(*shape, MEL_BINS, FRAMES_KEPT),
        labels=np.array([turn.label for turn in turns], np.int64).reshape(shape),
        speakers=np.array([turn.speaker for turn in turns], np.int64).reshape(shape),
        truth=np.array([_values(turn.speech) for turn in turns], np.float32).reshape(*shape, 3),
        baselines=np.array([_values(speaker) for speaker in speakers], np.float32).reshape(*shape, 3),
        vowels=np.array([turn.speech.vowels for turn in turns]).reshape(shape),
    )


def _write_features(folder: Path, split: str, seed: int, count: int, turns: int, workers: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    mels = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
        folder / "mels.npy", mode="w+", dtype=np.float16, shape=(count, turns, MEL_BINS, FRAMES_KEPT)
    )
    pieces = [(split, seed, range(start, min(start + _CHUNK, count)), turns) for start in range(0, count, _CHUNK)]
    rest: dict[str, list[NDArray[Any]]] = {name: [] for name in _FIELDS[1:]}
    with tqdm(total=count, desc=f"speaking ({split})", unit="dialogue") as bar:
        for (_, _, indices, _), features in zip(pieces, _map(_make_piece, pieces, workers), strict=True):
            mels[indices.start : indices.stop] = features.mels
            for name, arrays in rest.items():
                arrays.append(getattr(features, name))
            bar.update(len(indices))
    mels.flush()
    for name, arrays in rest.items():
        np.save(folder / f"{name}.npy", np.concatenate(arrays))
    (folder / "done").touch()


def _map(function: Any, pieces: list[Any], workers: int) -> Iterator[Features]:
    if workers <= 1:
        yield from map(function, pieces)
        return
    # spawn: a forked child can hang in torch's thread pool
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield from pool.map(function, pieces)


def _make_piece(piece: tuple[str, int, range, int]) -> Features:
    split, seed, indices, turns = piece
    return features_of([make_dialogue(split, seed, index, turns) for index in indices])


def _mels(extractor: WhisperFeatureExtractor, audio: list[NDArray[np.float32]]) -> NDArray[np.float16]:
    """(utterances, mel_bins, FRAMES_KEPT). Shorter padding than the host's leaves the kept frames as they are."""
    pieces = []
    for start in range(0, len(audio), 20):
        made = extractor(
            audio[start : start + 20],
            sampling_rate=voices.SAMPLING_RATE,
            max_length=(FRAMES_KEPT + 4) * HOP_LENGTH,
            return_tensors="np",
        )
        pieces.append(made["input_features"][:, :, :FRAMES_KEPT].astype(np.float16))
    return np.concatenate(pieces)


def _values(voice: Any) -> tuple[float, float, float]:
    return float(np.log(voice.pitch_hz)), voice.loudness_db, float(np.log(voice.tract))


def _fingerprint() -> str:
    """Eight hex digits of the features of two dialogues; they change with the settings of voices and extractor."""
    made = features_of([make_dialogue("dev", 0, index) for index in range(2)])
    return hashlib.sha256(made.mels.tobytes() + made.labels.tobytes()).hexdigest()[:8]
