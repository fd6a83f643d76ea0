"""Turns of a call of half an hour: how many are right, how fast, and in how much memory."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mal_adapter.ser.turns.turn import Turn
from tests.benchmarks.rows import Row
from tests.spoken_calls import VOICES, Call, have_voices, make_call, share_found, write_call

__all__ = ["turns_of_calls"]

MINUTES = 30
#: Other calls, of five minutes: their sampling rate, voices, noise, overlap, crosstalk, and the second speaker's level.
OTHERS: tuple[tuple[int, int, float, float, float | None, float], ...] = (
    (8_000, 1, -50.0, 0.15, None, 0.0),
    (8_000, 2, -30.0, 0.3, 18.0, -6.0),
    (16_000, 3, -40.0, 0.15, 22.0, 4.0),
    (8_000, 0, -22.0, 0.15, 25.0, 0.0),
)
#: Run in a process of its own: the first file loads everything, so that only the recording is measured.
SCRIPT = """
import json, re, sys, time
from pathlib import Path
import torch
from mal_adapter.ser.turns import find_turns


def kibibytes(what):
    return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])


torch.set_num_threads(1)
list(find_turns(sys.argv[1], ["customer", "agent"]))
Path("/proc/self/clear_refs").write_text("5")  # forget the peak
before = kibibytes("VmRSS")
started = time.process_time()
turns = [(t.start_s, t.end_s, t.speaker, t.channel) for t in find_turns(sys.argv[2], ["customer", "agent"])]
seconds = time.process_time() - started
mebibytes = (kibibytes("VmHWM") - before) / 1024
print(json.dumps({"turns": turns, "seconds": seconds, "mebibytes": mebibytes}))
"""


def turns_of_calls(device: str, seconds: float) -> Iterator[Row]:
    """Find the turns of spoken calls, 8 kHz and mu-law unless said otherwise, with the default settings."""
    if not have_voices():
        return
    with tempfile.TemporaryDirectory() as folder:
        short = write_call(Path(folder) / "short.wav", make_call(10, 1))
        call = make_call(60 * MINUTES, 7)
        found = _find(short, write_call(Path(folder) / "call.wav", call))
        size = f"{MINUTES} min, 2 channels, noise -35 dB, crosstalk -25 dB, {len(call.turns)} turns"
        yield _share(call, found, size)
        yield Row("find_turns: times faster than real time", size, 60 * MINUTES / found["seconds"], "≥", 100.0)
        yield Row("find_turns: MiB at its peak, beyond what is loaded", size, found["mebibytes"], "≤", 64.0)
        for number, (rate, voices, noise_db, overlap, crosstalk_db, louder_db) in enumerate(OTHERS):
            call = make_call(
                300,
                number,
                sampling_rate=rate,
                voices=VOICES[voices],
                noise_db=noise_db,
                overlap=overlap,
                crosstalk_db=crosstalk_db,
                louder_db=louder_db,
            )
            found = _find(short, write_call(Path(folder) / f"{number}.wav", call))
            copy = "no crosstalk" if crosstalk_db is None else f"crosstalk -{crosstalk_db:.0f} dB"
            yield _share(
                call,
                found,
                f"5 min at {rate // 1000} kHz, {' and '.join(VOICES[voices])}, noise {noise_db:.0f} dB, "
                f"{overlap:.0%} overlap, {copy}, second speaker {louder_db:+.0f} dB",
            )


def _share(call: Call, found: dict[str, Any], size: str) -> Row:
    turns = [Turn(start_s, end_s, speaker, channel) for start_s, end_s, speaker, channel in found["turns"]]
    note = f"{len(turns)} turns were found, of {len(call.turns)}"
    share = share_found(turns, call.turns)
    return Row("turns whose both ends are within 0.2 s", size, share, "≥", 0.95, note=note)


def _find(first: Path, path: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", SCRIPT, str(first), str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found
