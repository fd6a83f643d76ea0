"""Options and arguments that several commands share."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "CORPUS_PANEL",
    "MODEL_PANEL",
    "Adapter",
    "Corpus",
    "Device",
    "Dtype",
    "DtypeOption",
    "Labels",
    "Model",
    "Prompt",
    "Root",
    "Split",
    "json_option",
    "labels_option",
    "model_option",
    "prompt_option",
]

CORPUS_PANEL, MODEL_PANEL = "Corpus", "Model"


# ------------------------------------------------------------------------------------------------------ the corpus


def _complete_corpus(incomplete: str) -> list[str]:
    """Names of corpora, for completion in a shell; the shell completes paths if this returns nothing."""
    names = ("meld", "iemocap", "emorynlp", "m3ed")
    return [name for name in names if incomplete and name.startswith(incomplete)]


Corpus = Annotated[
    str,
    typer.Argument(
        metavar="CORPUS",
        help="A .jsonl manifest, a folder of manifests, or meld, iemocap, emorynlp or m3ed with --root.",
        autocompletion=_complete_corpus,
    ),
]
Root = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="The folder of the unpacked corpus.", rich_help_panel=CORPUS_PANEL),
]
Split = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="A part of the corpus; may be repeated.", rich_help_panel=CORPUS_PANEL),
]


# ------------------------------------------------------------------------------------------------------- the model


class Dtype(str, Enum):
    """The dtype of a model's weights."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def model_option(default: str | None = None) -> Any:
    """The option --model; `default` describes the model that is used without it, None if the option is required."""
    usual = "" if default is None else f" (default: {default})"
    return typer.Option(
        metavar="NAME", help=f"Folder or Hub id of an audio language model{usual}.", rich_help_panel=MODEL_PANEL
    )


def labels_option(default: str) -> Any:
    """The option --labels; `default` describes the labels that are used without it."""
    return typer.Option(
        metavar="A,B,...", help=f"The possible answers (default: {default}).", rich_help_panel=MODEL_PANEL
    )


def prompt_option(default: str) -> Any:
    """The option --prompt; `default` describes the question that is asked without it."""
    return typer.Option(
        metavar="TEXT", help=f"The question about each utterance (default: {default}).", rich_help_panel=MODEL_PANEL
    )


Model = Annotated[str | None, model_option("the adapter's, or the demo's tiny one")]
Adapter = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Folder or Hub id of a memory trained for it (default: the demo's for the demo's model).",
        rich_help_panel=MODEL_PANEL,
    ),
]
Labels = Annotated[str | None, labels_option("those of the adapter")]
Prompt = Annotated[str | None, prompt_option("the adapter's")]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="cpu, cuda or cuda:1; or auto, which spreads the model over all GPUs and the main memory (default: the "
        "first GPU if there is one).",
        rich_help_panel=MODEL_PANEL,
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="Of the model's weights: bfloat16, float16, float32, or auto for the checkpoint's.",
        rich_help_panel=MODEL_PANEL,
    ),
]


# ------------------------------------------------------------------------------------------------------ the output


def json_option(fields: str) -> Any:
    """The option --json of a command whose answer has these fields."""
    return typer.Option("--json", help=f"Print one JSON object: {fields}.", rich_help_panel="Output")
