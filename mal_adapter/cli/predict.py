"""`mal-adapter predict`."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mal_adapter import demo
from mal_adapter.cli.hosts import Labels, Prompt, load_recognizer
from mal_adapter.cli.output import complain, row

if TYPE_CHECKING:
    from mal_adapter.ser.dialogue import Dialogue
    from mal_adapter.ser.recognizer import EmotionRecognizer, Failure, Prediction

__all__ = ["predict"]

#: The exit code when some files could not be heard; also what typer exits with on wrong usage.
BAD_FILES = 2


def predict(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="MANIFEST_OR_WAVS",
            help="Sound files in the order in which they were spoken, which make one dialogue; or .jsonl manifests.",
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of an audio language model (default: the demo's tiny one).")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a trained memory for it (default: the demo's).")
    ] = None,
    no_memory: Annotated[bool, typer.Option("--no-memory", help="Each utterance alone, by the plain model.")] = False,
    labels: Labels = None,
    prompt: Prompt = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Name the emotion of each utterance of a dialogue, with the dialogue so far in memory.

    Exit code 2 if a file could not be read; the others are answered all the same.
    """
    dialogues, unread = _dialogues(inputs)
    if not dialogues:
        raise typer.Exit(BAD_FILES)
    if model is None and adapter is None:
        model, adapter = str(demo.HOST_FOLDER), str(demo.ADAPTER_FOLDER)
    recognizer = load_recognizer(model, adapter, labels, prompt, memory=not no_memory)
    if adapter is None and not no_memory:
        typer.echo("note: no --adapter, so each utterance is heard alone", err=True)
    results = (result for dialogue in dialogues for result in recognizer.recognize(dialogue))
    failures = _print_json(recognizer, results) if as_json else _print_tables(recognizer, dialogues, results)
    if unread or failures:
        raise typer.Exit(BAD_FILES)


def _dialogues(inputs: Sequence[Path]) -> "tuple[list[Dialogue], int]":
    """The dialogues of all inputs, and how many manifests could not be read."""
    from mal_adapter.errors import ManifestError
    from mal_adapter.ser.dialogue import Dialogue, Utterance, read_manifest

    dialogues: list[Dialogue] = []
    sounds = [path for path in inputs if path.suffix.lower() not in (".jsonl", ".json")]
    if sounds:
        folders = {path.absolute().parent for path in sounds}
        name = (folders.pop().name if len(folders) == 1 else "") or "dialogue"
        names = [path.name for path in sounds]
        ids = [file if names.count(file) == 1 else f"{n}-{file}" for n, file in enumerate(names)]
        turns = (Utterance(name, utterance_id, "?", path) for utterance_id, path in zip(ids, sounds, strict=True))
        dialogues.append(Dialogue(name, tuple(turns)))
    unread = 0
    for path in inputs:
        if path not in sounds:
            try:
                dialogues.extend(read_manifest(path))
            except ManifestError as error:
                complain(error)
                unread += 1
    return dialogues, unread


def _print_tables(
    recognizer: "EmotionRecognizer", dialogues: "Sequence[Dialogue]", results: "Iterator[Prediction | Failure]"
) -> int:
    """Prints a table per dialogue, a row as soon as it is known. Returns the number of failures."""
    from mal_adapter.ser.recognizer import Failure

    turns = [utterance for dialogue in dialogues for utterance in dialogue.utterances]
    truth = any(utterance.emotion is not None for utterance in turns)
    widest = max(map(len, recognizer.labels))
    widths = [
        max(len("utterance"), *(len(utterance.utterance_id) for utterance in turns)),
        max(len("speaker"), *(len(utterance.speaker) for utterance in turns)),
        max(len("emotion"), widest),
        *([max(len("truth"), *(len(utterance.emotion or "") for utterance in turns))] if truth else []),
        len("seconds"),
        *(max(4, len(name)) for name in recognizer.labels),
    ]
    header = ["utterance", "speaker", "emotion", *(["truth"] if truth else []), "seconds", *recognizer.labels]
    shown, failures = None, 0
    for result in results:
        utterance = result.utterance
        if isinstance(result, Failure):
            complain(result.error)
            failures += 1
            continue
        if utterance.dialogue_id != shown:
            typer.echo(("" if shown is None else "\n") + f"dialogue {utterance.dialogue_id}")
            typer.echo(row(header, widths))
            shown = utterance.dialogue_id
        cells = [utterance.utterance_id, utterance.speaker, result.label]
        cells += [utterance.emotion or ""] if truth else []
        cells += [f"{result.audio_s:.2f}", *(f"{value:.2f}" for value in result.probabilities.values())]
        typer.echo(row(cells, widths))
    return failures


def _print_json(recognizer: "EmotionRecognizer", results: "Iterator[Prediction | Failure]") -> int:
    """Prints one object when all is known. Returns the number of failures."""
    from mal_adapter.ser.recognizer import Failure

    utterances: list[dict[str, Any]] = []
    for result in results:
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
            entry["error"] = str(result.error)
        else:
            entry["emotion"], entry["probabilities"] = result.label, result.probabilities
            entry["audio_s"], entry["elapsed_s"] = result.audio_s, result.elapsed_s
        utterances.append(entry)
    answer = {
        "memory": recognizer.memory is not None,
        "labels": list(recognizer.labels),
        "prompt": recognizer.prompt,
        "utterances": utterances,
    }
    typer.echo(json.dumps(answer, indent=2))
    return sum("error" in entry for entry in utterances)
