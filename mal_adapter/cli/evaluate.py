"""`mal-adapter evaluate` and `mal-adapter report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mal_adapter.cli.data import Corpus, Root, Split, read_data
from mal_adapter.cli.hosts import Labels, Prompt, load_recognizer

if TYPE_CHECKING:
    from mal_adapter.ser.evaluation import Evaluation

__all__ = ["evaluate", "report"]

Against = Annotated[
    list[Path] | None,
    typer.Option(help="Folder of another evaluation of the same utterances, to compare with; may be repeated."),
]


def evaluate(
    corpus: Corpus,
    output: Annotated[Path, typer.Option(help="Folder for the answers and the report.")],
    root: Root = None,
    split: Split = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of an audio language model (default: the adapter's).")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a trained memory; without, the model is heard alone.")
    ] = None,
    labels: Labels = None,
    prompt: Prompt = None,
    arms: Annotated[
        str | None,
        typer.Option(
            help="What to hear, with commas: bare, right, reset, swapped, mixed, shuffled, told (a memory per true "
            "speaker), history (utterances before it in the prompt). Default: all but the last two."
        ),
    ] = None,
    history: Annotated[int, typer.Option(min=1, help="How many utterances the arm history joins.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Utterances in one forward.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the random orders.")] = 0,
    against: Against = None,
    card: Annotated[
        bool, typer.Option("--card", help="Also write the figures into the adapter's model card; needs a folder.")
    ] = False,
) -> None:
    """Measure a memory on dialogues with known emotions, and whether it is the memory that helps.

    Stopped? Run it again: what was heard is kept. On several devices: accelerate launch -m mal_adapter.cli evaluate ...
    """
    from mal_adapter.errors import ConfigError, EvaluationError

    try:
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        from mal_adapter.ser import evaluation
    except ImportError as error:
        raise EvaluationError(f"{error}; pip install 'mal-adapter[train]'") from error

    if card and (adapter is None or not Path(adapter).is_dir()):
        raise ConfigError("--card writes into the adapter's folder; give one with --adapter, or leave out --card")
    if model is None and adapter is None:
        raise ConfigError("nothing to evaluate; give --adapter, --model or both")
    data = read_data(corpus, root, split, ("test",))
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    rivals = [evaluation.read_evaluation(folder) for folder in against or ()]
    recognizer = load_recognizer(model, adapter, labels, prompt, usual_labels=data.labels)
    recognizer.model.to(state.device)
    if recognizer.memory is not None:
        recognizer.memory.adapter.to(state.device)
    heard = evaluation.evaluate(
        recognizer,
        data.dialogues,
        output=output,
        arms=[arm.strip() for arm in arms.split(",")] if arms is not None else None,
        history=history,
        batch_size=batch_size,
        seed=seed,
    )
    if state.is_main_process:
        figures = _report(output, [heard], rivals)
        if card and recognizer.memory is not None:
            _write_card(recognizer.memory.adapter, Path(str(adapter)), figures, data.name, data.split)


def report(
    evaluations: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="Evaluations of different dialogues, such as all folds.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for report.html and report.json.")],
    against: Against = None,
) -> None:
    """Report several evaluations as one, such as the folds of a cross-validation."""
    from mal_adapter.errors import EvaluationError

    try:
        from mal_adapter.ser.evaluation import read_evaluation
    except ImportError as error:
        raise EvaluationError(f"{error}; pip install 'mal-adapter[train]'") from error

    _report(output, [read_evaluation(folder) for folder in evaluations], [read_evaluation(f) for f in against or ()])


def _report(folder: Path, evaluations: "list[Evaluation]", against: "list[Evaluation]") -> dict[str, Any]:
    """Writes the report and prints its table."""
    from mal_adapter.errors import EvaluationError

    try:
        from mal_adapter.ser.report import write_report

        figures = write_report(folder, evaluations, against)
    except ImportError as error:
        raise EvaluationError(f"{error}; pip install 'mal-adapter[train]'") from error
    systems = {**figures["arms"], **figures["against"]}
    width = max(map(len, systems))
    for name, scores in systems.items():
        low, high = scores["intervals"]["wa"]
        typer.echo(
            f"{name:<{width}}  WA {scores['wa']:.3f} ({low:.3f} to {high:.3f})  UA {scores['ua']:.3f}  "
            f"weighted F1 {scores['weighted_f1']:.3f}"
        )
    if figures["verdict"]:
        typer.echo(figures["verdict"])
    if figures["left_out"]:
        typer.echo(f"note: {len(figures['left_out'])} utterances could not be heard", err=True)
    typer.echo(f"report: {folder / 'report.html'}")
    return figures


def _write_card(adapter: Any, folder: Path, figures: dict[str, Any], name: str, split: str | None) -> None:
    from dataclasses import replace

    from mal_adapter.ser.report import card_entry

    entry = card_entry(figures, name, split)
    before = [
        result
        for result in adapter.card.evaluation or []
        if (result["dataset_name"], result.get("dataset_split")) != (name, split)
    ]
    adapter.card = replace(adapter.card, evaluation=[*before, entry])
    adapter.save_pretrained(folder)
