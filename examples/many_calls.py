"""Many calls side by side: the next utterance of each call is one row of a batch, with a memory of its own.

python examples/many_calls.py                              # 16 calls of 3 to 10 utterances on the package's tiny host
python examples/many_calls.py calls.jsonl --model Qwen/Qwen2-Audio-7B-Instruct --adapter user/their-memory

Prints the utterances per second one by one and in batches, and by how much the probabilities differ, which is rounding
alone: a batch is padded to its longest utterance, and calls that have ended drop out of it.
"""

import argparse
import tempfile
import time
from pathlib import Path

from mal_adapter import attach_memory
from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER
from mal_adapter.demo.dialogues import make_dialogue, write_wavs
from mal_adapter.ser.dialogue import read_manifest
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer, Failure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("manifest", type=Path, nargs="?")
parser.add_argument("--model", default=str(HOST_FOLDER))
parser.add_argument("--adapter", default=str(ADAPTER_FOLDER))
parser.add_argument("--calls", type=int, default=16, help="how many generated calls (default: %(default)s)")
options = parser.parse_args()
if options.manifest:
    calls = read_manifest(options.manifest)
else:
    generated = [make_dialogue("test", seed=7, index=n, turns=3 + n % 8) for n in range(options.calls)]
    calls = write_wavs(generated, tempfile.mkdtemp())

model, processor = load_host(options.model)
with attach_memory(model, adapter=options.adapter) as memory:
    recognizer = EmotionRecognizer(model, processor, memory)

    def hear(batch_size: int) -> dict[str, list[float]]:
        """Probabilities by utterance id, of those that can be heard."""
        memory.states.clear()
        heard, started = {}, time.perf_counter()
        for first in range(0, len(calls), batch_size):
            together = calls[first : first + batch_size]
            for turn in range(max(len(call.utterances) for call in together)):
                # One forward: row i reads and writes the session of its utterance's dialogue.
                results = recognizer.answer([call.utterances[turn] for call in together if turn < len(call.utterances)])
                for result in results:
                    if not isinstance(result, Failure):
                        key = f"{result.utterance.dialogue_id}/{result.utterance.utterance_id}"
                        heard[key] = list(result.probabilities.values())
        print(f"{batch_size:2} at a time: {len(heard) / (time.perf_counter() - started):6.1f} utterances per second")
        return heard

    hear(len(calls))  # the first forwards of a process are slower
    one_by_one, together = hear(1), hear(len(calls))

apart = max(abs(a - b) for key in one_by_one for a, b in zip(one_by_one[key], together[key], strict=True))
print(f"largest difference of a probability: {apart:.1e}")
