"""One call, answered by two processes in turn: the second continues where the first stopped.

python examples/resume_a_call.py                                   # sessions in a folder
python examples/resume_a_call.py redis://:password@localhost/0     # or in Redis, for replicas on many machines
"""

import subprocess
import sys
import tempfile

from mal_adapter import attach_memory
from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER
from mal_adapter.demo.dialogues import make_dialogues, write_wavs
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer, Failure


def answer(store: str, first: int, last: int) -> None:
    """Answer utterances `first` to `last` - 1 of the call; its state is saved in `store`."""
    dialogue = write_wavs(list(make_dialogues("test", seed=7, count=1)), tempfile.mkdtemp())[0]
    model, processor = load_host(str(HOST_FOLDER))
    with attach_memory(model, adapter=ADAPTER_FOLDER, store=store) as memory:
        recognizer = EmotionRecognizer(model, processor, memory)
        if first == 0:
            memory.states.pop(dialogue.dialogue_id, None)  # a new call
        for utterance in dialogue.utterances[first:last]:
            (result,) = recognizer.answer([utterance])
            if isinstance(result, Failure):
                raise result.error
            print(f"{utterance.speaker}: {result.label:8} {result.probabilities[result.label]:.4f}", flush=True)
        utterances = memory.states[dialogue.dialogue_id].utterances.item()
        print(f"{dialogue.dialogue_id} has {utterances} utterances in memory", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        answer(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    else:
        place = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="sessions-")
        for half in (("0", "5"), ("5", "10")):
            subprocess.run([sys.executable, __file__, place, *half], check=True)
