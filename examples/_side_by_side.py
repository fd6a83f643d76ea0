"""What the examples with a large checkpoint share: reading dialogues, and printing answers with and without memory."""

from collections.abc import Sequence
from pathlib import Path

from mal_adapter.ser.dialogue import Dialogue, Utterance, read_manifest
from mal_adapter.ser.recognizer import EmotionRecognizer, Failure, Prediction


def read_dialogues(paths: Sequence[Path]) -> list[Dialogue]:
    """Manifests hold dialogues of their own; all sound files together are one, in the order given."""
    dialogues = [dialogue for path in paths if path.suffix == ".jsonl" for dialogue in read_manifest(path)]
    sounds = [path for path in paths if path.suffix != ".jsonl"]
    if sounds:
        turns = (Utterance("call", f"{turn}-{path.name}", "?", path) for turn, path in enumerate(sounds, start=1))
        dialogues.append(Dialogue("call", tuple(turns)))
    return dialogues


def print_side_by_side(recognizer: EmotionRecognizer, dialogues: Sequence[Dialogue]) -> None:
    """A line per utterance as soon as it is answered, and what each dialogue's memory holds in the end."""
    alone = recognizer.without_memory()
    for dialogue in dialogues:
        print(f"{'utterance':24} {'with memory':13} {'without':13} truth")
        for result, without in zip(recognizer.recognize(dialogue), alone.recognize(dialogue), strict=True):
            spoken = result.utterance
            print(f"{spoken.utterance_id:24} {_shown(result)} {_shown(without)} {spoken.emotion or ''}", flush=True)
        state = recognizer.memory.states[dialogue.dialogue_id]
        print(f"{dialogue.dialogue_id}: {int(state.utterances)} utterances, {int(state.tokens)} audio tokens in memory")


def _shown(result: Prediction | Failure) -> str:
    if isinstance(result, Failure):
        return str(result.error)
    return f"{result.label:8} {result.probabilities[result.label]:.2f}"
