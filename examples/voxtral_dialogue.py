"""Recognise the emotions of a dialogue with Voxtral, with a memory and without.

pip install 'mistral-common[audio]'                        # the tokenizer of Mistral's models
python examples/voxtral_dialogue.py turn1.wav turn2.wav turn3.wav --adapter user/their-memory
python examples/voxtral_dialogue.py calls.jsonl            # a manifest; without --adapter the memory is fresh
python examples/voxtral_dialogue.py --tiny                 # a random Voxtral, made and loaded on the spot

Prints a line per utterance: the emotion with the dialogue so far in memory, and without. A fresh memory changes
nothing until it is trained, so both columns are the same then. The checkpoint takes 9 GB. device_map="auto", which
needs accelerate, puts it on the GPUs, and the rest of it in main memory.
"""

import argparse
import tempfile
from pathlib import Path

from _side_by_side import print_side_by_side, read_dialogues
from _tiny_voxtral import save_tiny_voxtral
from transformers import AutoProcessor, VoxtralForConditionalGeneration

from mal_adapter import attach_memory
from mal_adapter.demo.dialogues import make_dialogues, write_wavs
from mal_adapter.ser.recognizer import EmotionRecognizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("inputs", type=Path, nargs="*", help="sound files in the order spoken, or .jsonl manifests")
parser.add_argument("--model", default="mistralai/Voxtral-Mini-3B-2507")
parser.add_argument("--adapter", help="folder or Hub id of a memory trained for this model")
parser.add_argument("--layer", type=int, help="of a fresh memory (default: the middle)")
parser.add_argument("--tiny", action="store_true", help="a random model, and a dialogue of generated voices")
options = parser.parse_args()
if options.tiny:
    print("a random model knows no emotions: its answers mean nothing, but every step is the real one")
    options.model = save_tiny_voxtral(Path(tempfile.mkdtemp()))
if not options.tiny and not options.inputs:
    parser.error("give sound files or a manifest, or --tiny")
dialogues = read_dialogues(options.inputs) or write_wavs([*make_dialogues("test", 7, 1)], tempfile.mkdtemp())

device_map = None if options.tiny else "auto"  # which needs accelerate
processor = AutoProcessor.from_pretrained(options.model)
model = VoxtralForConditionalGeneration.from_pretrained(options.model, dtype="auto", device_map=device_map)
if options.layer is None:
    options.layer = model.config.get_text_config().num_hidden_layers // 2
with attach_memory(model, None if options.adapter else options.layer, adapter=options.adapter) as memory:
    recognizer = EmotionRecognizer(model, processor, memory)
    print_side_by_side(recognizer, dialogues)
