"""Many calls side by side: the next utterance of each call is a row of the batch, with the memory of its own call.

python examples/many_calls.py                              # 16 calls of 3 to 10 utterances on the package's tiny host
python examples/many_calls.py calls.jsonl --model Qwen/Qwen2-Audio-7B-Instruct --adapter user/their-memory

Prints the utterances per second, one at a time and in batches, and the largest difference of a probability between the
two. It is rounding: a batch is padded to its longest utterance. Calls that have ended are no longer in the batch.
"""

import argparse
import tempfile
import time
from pathlib import Path

from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER
from mal_adapter.demo.dialogues import make_dialogue, write_wavs
from mal_adapter.ser import EmotionRecognizer, Failure, read_manifest

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

recognizer = EmotionRecognizer.from_pretrained(options.adapter, options.model)


def recognize_all(batch_size: int) -> dict[str, list[float]]:
    """Probabilities by utterance id, without utterances whose audio is unusable."""
    recognizer.memory.states.clear()
    answers, started = {}, time.perf_counter()
    for first in range(0, len(calls), batch_size):
        together = calls[first : first + batch_size]
        for turn in range(max(len(call.utterances) for call in together)):
            # One forward: row i reads and writes the session of its utterance's dialogue.
            results = recognizer.answer([call.utterances[turn] for call in together if turn < len(call.utterances)])
            for result in results:
                if not isinstance(result, Failure):
                    key = f"{result.utterance.dialogue_id}/{result.utterance.utterance_id}"
                    answers[key] = list(result.probabilities.values())
    print(f"{batch_size:2} at a time: {len(answers) / (time.perf_counter() - started):6.1f} utterances per second")
    return answers


recognize_all(len(calls))  # the first forwards of a process are slower
one_by_one, together = recognize_all(1), recognize_all(len(calls))
apart = max(abs(a - b) for key in one_by_one for a, b in zip(one_by_one[key], together[key], strict=True))
print(f"largest difference of a probability: {apart:.1e}")
