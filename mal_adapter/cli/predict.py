"""`mal-adapter predict`."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mal_adapter import demo
from mal_adapter.cli.failures import WRONG_INPUT
from mal_adapter.cli.hosts import device_of, load_recognizer
from mal_adapter.cli.options import (
    MODEL_PANEL,
    Adapter,
    Device,
    Dtype,
    DtypeOption,
    Labels,
    Model,
    Prompt,
    json_option,
)
from mal_adapter.cli.output import (
    complain,
    header,
    load_libraries,
    note,
    print_json,
    print_line,
    right_or_wrong,
    row,
    width,
)
from mal_adapter.cli.usage import shown

if TYPE_CHECKING:
    from mal_adapter.errors import ManifestError
    from mal_adapter.ser.dialogue import Dialogue
    from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer
    from mal_adapter.ser.recognizer.results import Failure, Prediction

__all__ = ["predict"]


@shown(
    "Try",
    ("One call, its sound files in the order spoken", "mal-adapter predict turn1.wav turn2.flac turn3.mp3"),
    (
        "Many calls, with a trained memory on its model, for a script",
        "mal-adapter predict calls.jsonl --adapter my-memory --json > answers.json",
    ),
    (
        "Your own model without memory, other labels, on the CPU",
        "mal-adapter predict calls.jsonl --model Qwen/Qwen2-Audio-7B-Instruct \\\n"
        "--labels calm,upset --device cpu --dtype bfloat16",
    ),
)
def predict(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE",
            help="Sound files (WAV, FLAC, OGG, MP3) in the order spoken, which are one dialogue; or .jsonl manifests, "
            "with a line per utterance: dialogue_id, utterance_id, speaker and audio.",
        ),
    ],
    model: Model = None,
    adapter: Adapter = None,
    no_memory: Annotated[
        bool,
        typer.Option(
            "--no-memory",
            help="Recognise each utterance on its own, with the plain model.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = False,
    labels: Labels = None,
    prompt: Prompt = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    as_json: Annotated[
        bool, json_option("model, adapter, memory, labels, prompt, device, dtype, utterances, not_read")
    ] = False,
) -> None:
    """Recognise the emotion of each utterance of a dialogue, with the dialogue so far in memory.

    A file that is missing, unreadable, silent or longer than the model processes gives one line on stderr and exit
    code 2; the other files are still answered. Without --model and --adapter, the demo's tiny model answers; it knows
    only synthetic voices.
    """
    dialogues, unread = _dialogues(inputs)
    for error in unread if dialogues else unread[:-1]:
        complain(error)
    if not dialogues:
        raise unread[-1]
    load_libraries()
    from mal_adapter.ser.progress import progress_bar
    from mal_adapter.ser.suitability import missing_sounds

    missing, count = missing_sounds(dialogues)
    if len(missing) == count and not as_json:  # nothing could be answered, so no model is loaded
        for path in missing:
            complain(f"{path}: there is no such file; check the path")
        raise typer.Exit(WRONG_INPUT)
    if model is None and adapter is None:
        model, adapter = str(demo.HOST_FOLDER), str(demo.ADAPTER_FOLDER)
    recognizer = load_recognizer(
        model, adapter, labels, prompt, device_of(device), dtype, spread=device == "auto", memory=not no_memory
    )
    if adapter is None and not no_memory:
        note("no --adapter, so each utterance is recognised on its own")
    results = progress_bar(
        (result for dialogue in dialogues for result in recognizer.recognize(dialogue)),
        desc="recognising",
        total=sum(len(dialogue.utterances) for dialogue in dialogues),
        unit="utterance",
        leave=False,
    )
    if as_json:
        entries = [_entry(result) for result in results]
        failures = sum("error" in entry for entry in entries)
        answer = {"utterances": entries, "not_read": [str(error) for error in unread]}
        print_json({**_settings(recognizer, adapter), **answer})
    else:
        failures = _print_tables(recognizer, dialogues, results)
    if unread or failures:
        raise typer.Exit(WRONG_INPUT)


def _dialogues(inputs: Sequence[Path]) -> "tuple[list[Dialogue], list[ManifestError]]":
    """(The dialogues of all inputs, the errors of manifests that can't be read)."""
    from mal_adapter.errors import ManifestError
    from mal_adapter.ser.dialogue import Dialogue, read_manifest

    dialogues: list[Dialogue] = []
    sounds = [path for path in inputs if path.suffix.lower() not in (".jsonl", ".json")]
    if sounds:
        _check_order(sounds)
        dialogues.append(Dialogue.from_files(sounds))
    unread = []
    for path in inputs:
        if path not in sounds:
            try:
                dialogues.extend(read_manifest(path))
            except ManifestError as error:
                unread.append(error)
    return dialogues, unread


def _check_order(sounds: Sequence[Path]) -> None:
    """Print a note if numbered files are not in the order of their numbers: the shell lists turn10 before turn2."""
    from mal_adapter.ser.names import natural
    from mal_adapter.ser.paths import file_name

    before: dict[str, Path] = {}
    for path in sounds:
        series = re.sub(r"\d+", "0", str(path))  # files whose names differ in numbers alone
        earlier = before.get(series)
        if earlier is not None and natural(str(path)) < natural(str(earlier)):
            note(
                f"{file_name(earlier)} is processed before {file_name(path)}, in the order given; if that is the "
                "shell's order and not the order spoken, list the files by number, as $(ls -v *.wav) does, or write a "
                "manifest"
            )
            return
        before[series] = path


def _print_tables(
    recognizer: "EmotionRecognizer", dialogues: "Sequence[Dialogue]", results: "Iterable[Prediction | Failure]"
) -> int:
    """Print a table per dialogue, each row as soon as it is known, and return the number of failures."""
    from mal_adapter.ser.recognizer.results import Failure

    turns = [utterance for dialogue in dialogues for utterance in dialogue.utterances]
    truth = any(utterance.emotion is not None for utterance in turns)
    labels = recognizer.labels
    columns = ["utterance", "speaker", "emotion", *(["truth"] if truth else []), "seconds", *labels]
    longest = [
        max(width(utterance.utterance_id) for utterance in turns),
        max(width(utterance.speaker) for utterance in turns),
        max(map(width, labels)),
        *([max(width(utterance.emotion or "") for utterance in turns)] if truth else []),
        *(len("0.00") for _ in ("seconds", *labels)),
    ]
    widths = [max(width(name), wide) for name, wide in zip(columns, longest, strict=True)]
    numbers = range(columns.index("seconds"), len(columns))
    shown_last, failures = None, 0
    for result in results:
        utterance = result.utterance
        if isinstance(result, Failure):
            complain(result.error)
            failures += 1
            continue
        if utterance.dialogue_id != shown_last:
            print_line(header([("" if shown_last is None else "\n") + f"dialogue {utterance.dialogue_id}"]))
            print_line(header(row(columns, widths, numbers)))
            shown_last = utterance.dialogue_id
        cells = [utterance.utterance_id, utterance.speaker, result.label]
        cells += [utterance.emotion or ""] if truth else []
        cells += [f"{result.audio_s:.2f}", *(f"{value:.2f}" for value in result.probabilities.values())]
        padded = row(cells, widths, numbers)
        if utterance.emotion is not None and utterance.emotion in labels:
            padded[2] = right_or_wrong(padded[2], result.label == labels.lookup(utterance.emotion))
        print_line("  ".join(padded).rstrip())
    return failures


def _settings(recognizer: "EmotionRecognizer", adapter: str | None) -> dict[str, Any]:
    """The model, the adapter and the task, for the JSON output."""
    return {
        "model": recognizer.model.name_or_path,
        "adapter": adapter,
        "memory": recognizer.memory is not None,
        "labels": list(recognizer.labels),
        "prompt": recognizer.prompt,
        "device": str(recognizer.model.device),
        "dtype": str(recognizer.model.dtype).removeprefix("torch."),
    }


def _entry(result: "Prediction | Failure") -> dict[str, Any]:
    from mal_adapter.ser.recognizer.results import Failure

    utterance = result.utterance
    entry: dict[str, Any] = {
        "dialogue_id": utterance.dialogue_id,
        "utterance_id": utterance.utterance_id,
        "speaker": utterance.speaker,
        "audio": str(utterance.audio),
    }
    if utterance.emotion is not None:
        entry["truth"] = utterance.emotion
    if isinstance(result, Failure):
        complain(result.error)
        return {**entry, "error": str(result.error)}
    return {
        **entry,
        "emotion": result.label,
        "probabilities": result.probabilities,
        "audio_s": result.audio_s,
        "elapsed_s": result.elapsed_s,
    }
