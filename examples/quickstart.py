"""Recognise the emotions of a dialogue with a trained memory, utterance by utterance.

python examples/quickstart.py                               # the tiny host and memory that come with the package
python examples/quickstart.py MODEL ADAPTER a.wav b.wav …   # a host, a memory trained for it, your own sound files
"""

import sys
import tempfile

from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER
from mal_adapter.demo.dialogues import make_dialogues, write_wavs
from mal_adapter.ser import Dialogue, EmotionRecognizer, Failure

if len(sys.argv) > 3:
    model, adapter, *paths = sys.argv[1:]
    dialogue = Dialogue.from_files(paths)
else:
    adapter, model = ADAPTER_FOLDER, HOST_FOLDER
    dialogue = write_wavs(list(make_dialogues("test", seed=7, count=1)), tempfile.mkdtemp())[0]

recognizer = EmotionRecognizer.from_pretrained(adapter, model)  # with the labels and the question of its training
for result in recognizer.recognize(dialogue):
    if isinstance(result, Failure):
        print(result.error, file=sys.stderr)
        continue
    spoken = result.utterance
    print(f"{spoken.speaker}: {result.label:8} {result.probabilities[result.label]:.2f}", spoken.emotion or "")
