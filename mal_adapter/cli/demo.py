"""`mal-adapter demo`."""

import re
from pathlib import Path
from typing import Annotated

import typer

from mal_adapter.cli.options import json_option
from mal_adapter.cli.output import header, load_libraries, print_json, print_line, right_or_wrong
from mal_adapter.cli.usage import shown
from mal_adapter.extras import require

__all__ = ["demo", "painted"]


@shown(
    "Try",
    ("The demonstration, in half a minute", "mal-adapter demo"),
    ("Other dialogues, and a picture (needs matplotlib)", "mal-adapter demo --seed 1 --plot demo.png"),
)
def demo(
    dialogues: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of held-out dialogues of ten utterances.")
    ] = 50,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Each seed gives another set of dialogues.")] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw accuracy by turn and one dialogue into a .png, .svg or .pdf file.",
            rich_help_panel="Output",
        ),
    ] = None,
    as_json: Annotated[
        bool,
        json_option(
            "accuracy_without_memory, accuracy_with_memory, by_turn_without_memory, by_turn_with_memory, intervals, "
            "dialogues, seed"
        ),
    ] = False,
) -> None:
    """Recognise emotions in synthetic dialogues with a tiny Qwen2-Audio, without its memory and with it.

    The model comes with the package; nothing is downloaded. Voices and emotions are synthetic: an emotion is a shift
    from how a speaker usually sounds. One utterance alone is ambiguous; the past of the dialogue resolves it.
    """
    import tempfile

    if plot is not None:
        _check_plot(plot)
    load_libraries()
    from mal_adapter.demo.run import describe_report, plot_report, run_demo

    with tempfile.TemporaryDirectory(prefix="mal-adapter-demo-") as folder:
        report = run_demo(dialogues, seed, Path(folder))
    if as_json:
        print_json(report.to_dict())
    else:
        print_line(painted(describe_report(report)))
    if plot is not None:
        plot_report(report, plot)
        if not as_json:
            print_line(f"plot: {plot}")


def painted(text: str) -> str:
    """The text of `describe_report`, with bold headers, correct answers in green and wrong ones in red."""
    title, columns, *lines = text.splitlines()
    painted = [header([title]), header([columns])]
    for line in lines:
        line = re.sub(r"\w+ [01]\.\d\d \+(?!\S)", lambda answer: right_or_wrong(answer[0], True), line)
        painted.append(re.sub(r"\w+ [01]\.\d\d -(?!\S)", lambda answer: right_or_wrong(answer[0], False), line))
    return "\n".join(painted)


def _check_plot(plot: Path) -> None:
    """Raise typer.BadParameter before the work if the plot can't be drawn."""
    require("--plot", "matplotlib", extra="plot")
    if plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"{plot} is not a .png, .svg or .pdf file", param_hint="--plot")
    if not plot.absolute().parent.is_dir():
        raise typer.BadParameter(f"the folder {plot.absolute().parent} does not exist", param_hint="--plot")
