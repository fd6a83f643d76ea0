"""Recognise the emotions of a dialogue with Qwen2-Audio, with a memory and without.

python examples/qwen2_audio_dialogue.py turn1.wav turn2.wav turn3.wav --adapter user/their-memory
python examples/qwen2_audio_dialogue.py calls.jsonl        # a manifest; without --adapter the memory is fresh
python examples/qwen2_audio_dialogue.py --tiny             # the package's tiny Qwen2-Audio, its memory, its voices

Prints a line per utterance: the emotion with the dialogue so far in memory, and without. A fresh memory changes
nothing until it is trained (examples/train_meld.py), so both columns are the same then. The checkpoint takes 17 GB.
device_map="auto", which needs accelerate, puts it on the GPUs, and the rest of it in main memory.
"""

import argparse
import tempfile
from pathlib import Path

from _side_by_side import print_side_by_side, read_dialogues
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from mal_adapter import attach_memory
from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER
from mal_adapter.demo.dialogues import make_dialogues, write_wavs
from mal_adapter.ser.recognizer import EmotionRecognizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("inputs", type=Path, nargs="*", help="sound files in the order spoken, or .jsonl manifests")
parser.add_argument("--model", default="Qwen/Qwen2-Audio-7B-Instruct")
parser.add_argument("--adapter", help="folder or Hub id of a memory trained for this model")
parser.add_argument("--layer", type=int, default=16, help="of a fresh memory (default: %(default)s)")
parser.add_argument("--tiny", action="store_true", help="the package's own model, adapter and dialogue")
options = parser.parse_args()
if options.tiny:
    options.model, options.adapter = str(HOST_FOLDER), options.adapter or str(ADAPTER_FOLDER)
if not options.tiny and not options.inputs:
    parser.error("give sound files or a manifest, or --tiny")
dialogues = read_dialogues(options.inputs) or write_wavs([*make_dialogues("test", 7, 1)], tempfile.mkdtemp())

device_map = None if options.tiny else "auto"  # which needs accelerate
processor = AutoProcessor.from_pretrained(options.model)
model = Qwen2AudioForConditionalGeneration.from_pretrained(options.model, dtype="auto", device_map=device_map)
with attach_memory(model, None if options.adapter else options.layer, adapter=options.adapter) as memory:
    recognizer = EmotionRecognizer(model, processor, memory)
    print_side_by_side(recognizer, dialogues)
