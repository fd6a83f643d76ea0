"""`mal-adapter evaluate` and `mal-adapter report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mal_adapter.cli.data import note_omissions, read_data
from mal_adapter.cli.hosts import load_recognizer, start_process
from mal_adapter.cli.options import (
    MODEL_PANEL,
    Corpus,
    Device,
    Dtype,
    DtypeOption,
    Labels,
    Prompt,
    Root,
    Split,
    json_option,
)
from mal_adapter.cli.output import header, load_libraries, note, print_json, print_line, row, width
from mal_adapter.cli.usage import shown
from mal_adapter.extras import explain_missing
from mal_adapter.ser.evaluation.arms import ARMS, AUDIT, check_arms

if TYPE_CHECKING:
    from mal_adapter.ser.evaluation.evaluation import Evaluation

__all__ = ["evaluate", "report"]

PANEL = "Measuring"
Against = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FOLDER",
        help="Another evaluation of the same utterances, for comparison; may be repeated.",
        exists=True,
        file_okay=False,
        rich_help_panel="Output",
    ),
]
FIELDS = (
    "output, page, and those of report.json: run, arms, against, compared, clusters, audit, verdict, "
    "gain_over, gain_by_turn, left_out"
)


@shown(
    "Train and measure",
    (
        "A trained memory, on dialogues with known emotions",
        "mal-adapter evaluate test.jsonl --adapter my-memory --output my-evaluation",
    ),
    (
        "MELD's test split, compared with an earlier evaluation of a GRU",
        "mal-adapter evaluate meld --root MELD.Raw --adapter my-memory \\\n"
        "--output my-evaluation --against gru-evaluation",
    ),
    (
        "On all GPUs",
        "accelerate launch -m mal_adapter.cli evaluate test.jsonl \\\n--adapter my-memory --output my-evaluation",
    ),
)
def evaluate(
    corpus: Corpus,
    *,
    root: Root = None,
    split: Split = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Folder or Hub id of an audio language model (default: the adapter's).",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Folder or Hub id of a trained memory. Without it, the model is evaluated alone.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    labels: Labels = None,
    prompt: Prompt = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    control: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Folder or Hub id of the control of this memory, trained without a past (default: the folder control "
            "of the adapter, which train --with-control writes).",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help=f"Which arms to run: {', '.join(f'{name} ({arm.title})' for name, arm in ARMS.items())}. "
            f"Default: {', '.join(AUDIT)}. With a control, control too.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    history: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="How many earlier utterances the arm history joins.", rich_help_panel=PANEL
        ),
    ] = 3,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Utterances in one forward.", rich_help_panel=PANEL)
    ] = 8,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Chooses the random orders of the arms shuffled and other_dialogues.",
            rich_help_panel=PANEL,
        ),
    ] = 0,
    activations: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep the output of the model's frozen part in this folder; evaluations of other memories of the same "
            "model and layer can share it. Without it, it is kept for the dialogues at work only.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="For the answers and the report.", rich_help_panel="Output")
    ],
    against: Against = None,
    card: Annotated[
        bool,
        typer.Option(
            "--card",
            help="Also write the figures into the model card of the adapter, which must be a folder.",
            rich_help_panel="Output",
        ),
    ] = False,
    as_json: Annotated[bool, json_option(FIELDS)] = False,
) -> None:
    """Measure a memory on dialogues with known emotions, and whether its gain comes from their history.

    Each dialogue is evaluated with its own memory, without memory, with wrong pasts, and with the control: the same
    adapter, trained without a past. The verdict says whether the dialogue's own past beats all of them. To continue
    after a stop, run the same command again.
    """
    from mal_adapter.errors import ConfigError, raise_problems

    if card and (adapter is None or not Path(adapter).is_dir()):
        raise ConfigError("--card writes into the adapter's folder; give one with --adapter, or leave out --card")
    chosen = None if arms is None else [arm.strip() for arm in arms.split(",")]
    if chosen is not None:
        check_arms(chosen)
    if card and chosen is not None and "own" not in chosen:
        raise ConfigError("--card writes the figures of the arm own; add it to --arms, or leave out --card")
    if model is None and adapter is None:
        raise ConfigError("nothing to evaluate; give --adapter, --model or both")
    load_libraries()

    with explain_missing("an evaluation", extra="train"):
        from mal_adapter.ser.evaluation import evaluation
        from mal_adapter.ser.evaluation.control import CONTROL_NAME
        from mal_adapter.ser.evaluation.report import FEWEST_DIALOGUES, report_problems, rival_problems

    raise_problems(report_problems(output))
    data = read_data(corpus, root, split, ("test",))
    state, place = start_process(device)
    rivals = [evaluation.read_evaluation(folder) for folder in against or ()]
    recognizer = load_recognizer(
        model,
        adapter,
        labels,
        prompt,
        place,
        dtype,
        spread=device == "auto",
        usual_labels=data.labels,
        dialogues=data.dialogues,
    )
    if control is None and adapter is not None and (chosen is None or "control" in chosen):
        beside = Path(adapter, CONTROL_NAME)
        control = str(beside) if (beside / "config.json").is_file() else None
    usual = AUDIT if recognizer.reads_memory else ("host_only",)
    raise_problems(rival_problems(data.dialogues, recognizer.labels, chosen or usual, rivals))
    if card and recognizer.memory is not None:
        recognizer.memory.adapter.check_folder(str(adapter), recognizer.memory.adapter.metadata)
    if state.is_main_process:
        note_omissions(data.dialogues, recognizer.labels)
        if len(data.dialogues) < FEWEST_DIALOGUES:
            note(f"with fewer than {FEWEST_DIALOGUES} dialogues, no difference can be significant")
    try:
        evaluated = evaluation.evaluate(
            recognizer,
            data.dialogues,
            output=output,
            control=control,
            arms=chosen,
            history=history,
            batch_size=batch_size,
            seed=seed,
            activations=activations,
        )
    except KeyboardInterrupt:
        note("run the same command again to continue; the answers so far are kept")
        raise
    if state.is_main_process:
        figures = _report(output, [evaluated], rivals, as_json=as_json)
        if card and recognizer.memory is not None:
            _write_card(recognizer.memory.adapter, Path(str(adapter)), figures, data.name, data.split)


@shown(
    "Train and measure",
    (
        "A cross-validation over sessions, one evaluation and one memory for each",
        "mal-adapter report eval-1 eval-2 eval-3 eval-4 eval-5 --output eval",
    ),
)
def report(
    evaluations: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER",
            help="Evaluations of different dialogues, such as the folds.",
            exists=True,
            file_okay=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="For report.html and report.json.", rich_help_panel="Output")
    ],
    against: Against = None,
    as_json: Annotated[bool, json_option(FIELDS)] = False,
) -> None:
    """Report several evaluations as one, such as the folds of a cross-validation.

    The model does not run: the report is made from the answers that `mal-adapter evaluate` has kept.
    """
    load_libraries()
    with explain_missing("a report", extra="train"):
        from mal_adapter.ser.evaluation.evaluation import read_evaluation

    rivals = [read_evaluation(folder) for folder in against or ()]
    _report(output, [read_evaluation(folder) for folder in evaluations], rivals, as_json=as_json)


def _report(
    folder: Path, evaluations: "list[Evaluation]", against: "list[Evaluation]", *, as_json: bool
) -> dict[str, Any]:
    """Write the report and print its table."""
    from mal_adapter.ser.evaluation.report import write_report
    from mal_adapter.ser.progress import working

    with working("testing the differences"):
        figures = write_report(folder, evaluations, against)
    if figures["left_out"]:
        note(f"{len(figures['left_out'])} utterances could not be processed")
    page = folder / "report.html"
    if as_json:
        print_json({"output": str(folder), "page": str(page), **figures})
        return figures
    systems = {**figures["arms"], **figures["against"]}
    widest = max(map(width, systems))
    for name, scores in systems.items():
        low, high = scores["intervals"]["wa"]
        [padded] = row([name], [widest])
        print_line(
            f"{padded}  WA {scores['wa']:.3f} ({low:.3f} to {high:.3f})  UA {scores['ua']:.3f}  "
            f"weighted F1 {scores['weighted_f1']:.3f}"
        )
    if figures["verdict"]:
        print_line(header([figures["verdict"]]))
    print_line(f"report: {page}")
    return figures


def _write_card(adapter: Any, folder: Path, figures: dict[str, Any], name: str, split: str | None) -> None:
    from dataclasses import replace

    from mal_adapter.ser.evaluation.report import card_entry

    entry = card_entry(figures, name, split)
    before = [
        result
        for result in adapter.metadata.evaluation or []
        if (result["dataset_name"], result.get("dataset_split")) != (name, split)
    ]
    adapter.metadata = replace(adapter.metadata, evaluation=[*before, entry])
    adapter.save_pretrained(folder)
