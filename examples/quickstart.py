"""Attach a memory to a Qwen2-Audio and let it hear a dialogue, utterance by utterance.

python examples/quickstart.py                               # the tiny host and memory that come with the package
python examples/quickstart.py MODEL ADAPTER a.wav b.wav …   # a checkpoint, a trained memory for it, your own audio
"""

import sys
import tempfile
from pathlib import Path

from mal_adapter import attach_memory
from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER
from mal_adapter.demo.dialogues import make_dialogues, write_wavs
from mal_adapter.ser.dialogue import Dialogue, Utterance
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer, Failure

if len(sys.argv) > 3:
    model_name, adapter_name, *paths = sys.argv[1:]
    utterances = tuple(Utterance("call", str(turn), "?", Path(path)) for turn, path in enumerate(paths, start=1))
    dialogue = Dialogue("call", utterances)
else:
    model_name, adapter_name = str(HOST_FOLDER), str(ADAPTER_FOLDER)
    dialogue = write_wavs(list(make_dialogues("test", seed=7, count=1)), tempfile.mkdtemp())[0]

model, processor = load_host(model_name)
with attach_memory(model, adapter=adapter_name) as memory:
    recognizer = EmotionRecognizer(model, processor, memory)  # the labels and the question it was trained with
    for result in recognizer.recognize(dialogue):
        if isinstance(result, Failure):
            print(f"{result.utterance.audio}: {result.error}", file=sys.stderr)
            continue
        spoken = result.utterance
        print(f"{spoken.speaker}: {result.label:8} {result.probabilities[result.label]:.2f}", spoken.emotion or "")
