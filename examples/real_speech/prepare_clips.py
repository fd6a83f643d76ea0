"""Copy the sound files of a folder as 16 kHz mono WAVs without silence at their ends, with the same names.

    python examples/real_speech/prepare_clips.py RAVDESS clips/RAVDESS

Recordings of acted emotions have up to a second of silence before the words, which a small host would have to encode
each time. Files that exist already are left as they are.
"""

from __future__ import annotations

import argparse
from math import gcd
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray
from scipy.signal import resample_poly
from tqdm.auto import tqdm

RATE = 16_000
FRAME = RATE // 100
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")

__all__ = ["RATE", "trimmed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seconds", type=float, default=3.0, help="longer clips are cut")
    options = parser.parse_args()
    found = sorted(path for path in options.source.rglob("*") if path.suffix.lower() in SUFFIXES)
    unusable = 0
    for path in tqdm(found, desc="clips"):
        target = (options.target / path.relative_to(options.source)).with_suffix(".wav")
        if target.exists():
            continue
        sound = trimmed(path, options.seconds)
        if sound is None:
            unusable += 1
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(target, sound, RATE, subtype="PCM_16")
    print(f"{len(found) - unusable} clips in {options.target}; {unusable} are silent, shorter than 0.3 s or unreadable")


def trimmed(path: Path, seconds: float) -> NDArray[np.float32] | None:
    """The samples from 50 ms before to 50 ms after what is at most 30 dB below the loudest; None if they are no use."""
    try:
        sound, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError:
        return None
    mono = sound.mean(1)
    if rate != RATE:
        common = gcd(rate, RATE)
        mono = resample_poly(mono, RATE // common, rate // common).astype(np.float32)
    frames = len(mono) // FRAME
    if frames < 20 or np.abs(mono).max() < 1e-4:
        return None
    power = (mono[: frames * FRAME].reshape(frames, FRAME) ** 2).mean(1)
    level = np.convolve(10 * np.log10(power + 1e-10), np.ones(3) / 3, "same")
    loud = np.flatnonzero(level > level.max() - 30)
    first, last = max(0, loud[0] - 5), min(frames, loud[-1] + 6)
    cut = mono[first * FRAME : last * FRAME][: round(seconds * RATE)]
    return cut if len(cut) >= 0.3 * RATE else None


if __name__ == "__main__":
    main()
