"""What it costs to read three seconds of a recording of an hour, of a file of three seconds, and the whole recording.

python -m tests.benchmarks.sound            # minutes, most of them to write the recordings; one thread
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.recognizer.audio import load_waveform

HOUR_S, PART_S, ROUNDS = 3600, 3, 9
ENCODINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "WAV, µ-law, 8 kHz": (8_000, {"format": "WAV", "subtype": "ULAW"}),
    "WAV, 16 bit, 44.1 kHz": (44_100, {"format": "WAV", "subtype": "PCM_16"}),
    "WAV, GSM 6.10, 8 kHz": (8_000, {"format": "WAV", "subtype": "GSM610"}),
    "FLAC, 16 kHz": (16_000, {"format": "FLAC"}),
    "MP3, 16 kHz": (16_000, {"format": "MP3"}),
    "OGG Vorbis, 16 kHz": (16_000, {"format": "OGG", "subtype": "VORBIS"}),
    "OGG Opus, 16 kHz": (16_000, {"format": "OGG", "subtype": "OPUS"}),
}


def write(path: Path, duration_s: int, sampling_rate: int, options: dict[str, Any]) -> None:
    """A recording of a tone in noise, a second at a time."""
    time_s = np.arange(sampling_rate) / sampling_rate
    noise = np.random.default_rng(0)
    with soundfile.SoundFile(path, "w", sampling_rate, 1, **options) as file:
        for _ in range(duration_s):
            file.write(0.2 * np.sin(2 * np.pi * 180 * time_s) + noise.normal(0, 0.01, sampling_rate))


def measure(path: str, start_s: str, end_s: str) -> None:
    """Run in its own process: print the first time and the median of the others in ms, and the growth of peak memory
    in MiB."""
    utterance = Utterance("d", "0", "A", Path(path), *(float(t) if t else None for t in (start_s, end_s)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(ROUNDS if start_s else 1):
        began = time.perf_counter()
        load_waveform(utterance)
        times.append(1000 * (time.perf_counter() - began))
    peak_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps([times[0], statistics.median(times[1:] or times), peak_mib]))


def measured(path: Path, start_s: float | str = "", end_s: float | str = "") -> list[float]:
    """Run `measure` in its own process."""
    command = [sys.executable, "-m", "tests.benchmarks.sound", str(path), str(start_s), str(end_s)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: list[float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Print the table."""
    print(
        f"| recording of {HOUR_S} s | {PART_S} s at its end: first, then ms | MiB | alone: ms | MiB | whole: ms | MiB |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, (sampling_rate, options) in ENCODINGS.items():
            long, short = Path(folder, "long"), Path(folder, "short")
            write(long, HOUR_S, sampling_rate, options)
            write(short, PART_S, sampling_rate, options)
            time.sleep(2.1)  # so that the lengths of the files are kept
            part, alone = measured(long, HOUR_S - 100, HOUR_S - 100 + PART_S), measured(short, 0.0, PART_S)
            whole = measured(long)
            print(
                f"| {name} | {part[0]:.1f}, {part[1]:.1f} | {part[2]:.1f} | {alone[1]:.1f} | {alone[2]:.1f} | "
                f"{whole[1]:.0f} | {whole[2]:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    measure(*sys.argv[1:]) if len(sys.argv) > 1 else main()
