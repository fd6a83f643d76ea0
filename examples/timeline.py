"""The emotions of a whole recording, turn by turn as they are known, and a page to look at and listen to.

python examples/timeline.py                          # a call of synthetic voices, with the tiny host of the package
python examples/timeline.py MODEL ADAPTER CALL.wav   # a host, a memory trained for it, a recording of yours
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile

from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER
from mal_adapter.demo.dialogues import make_dialogue
from mal_adapter.demo.voices import SAMPLING_RATE
from mal_adapter.ser import EmotionRecognizer
from mal_adapter.ser.recognizer.audio import sound_info
from mal_adapter.ser.timeline import Timeline, write_page
from mal_adapter.ser.turns import Turn

SPEAKERS = ("customer", "agent")


def make_call(path: Path, seed: int, turns: int = 30) -> list[Turn]:
    """Write a call with a channel per speaker, and return its turns."""
    rng = np.random.default_rng(seed)
    said, at = [], SAMPLING_RATE // 2
    parts: list[tuple[int, int, np.ndarray]] = []
    for turn in make_dialogue("test", seed, 0, turns).turns:
        times = at / SAMPLING_RATE, (at + turn.pcm.size) / SAMPLING_RATE
        said.append(Turn(*times, SPEAKERS[turn.speaker], channel=turn.speaker))
        parts.append((at, turn.speaker, turn.pcm))
        at += turn.pcm.size + int(rng.integers(SAMPLING_RATE // 10, SAMPLING_RATE // 2))
    sound = np.zeros((at, len(SPEAKERS)), np.int16)
    for start, channel, pcm in parts:
        sound[start : start + pcm.size, channel] = pcm
    soundfile.write(path, sound, SAMPLING_RATE)
    return said


if __name__ == "__main__":
    if len(sys.argv) > 3:
        model, adapter, recording = sys.argv[1:]
        turns = None  # found by voice activity
    else:
        model, adapter, recording = HOST_FOLDER, ADAPTER_FOLDER, Path(tempfile.mkdtemp()) / "call.wav"
        turns = make_call(recording, seed=7)

    recognizer = EmotionRecognizer.from_pretrained(adapter, model)
    entries = []
    for entry in recognizer.timeline(recording, turns):
        changed = "" if entry.emotion == entry.emotion_without_memory else f"not {entry.emotion_without_memory}"
        print(f"{entry.turn.start_s:7.2f}  {entry.turn.speaker:9} {entry.emotion or entry.error:9} {changed}".rstrip())
        entries.append(entry)

    timeline = Timeline(
        recording,
        sound_info(Path(recording)).duration_s,
        entries,
        tuple(recognizer.labels),
        session_id=Path(recording).stem,
        prompt=recognizer.prompt,
    )
    page = Path(recording).with_suffix(".html")
    write_page(timeline, page)
    print(page)
