"""`mal-adapter demo`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from mal_adapter.cli.output import quiet_transformers

__all__ = ["demo"]


def demo(
    dialogues: Annotated[int, typer.Option(min=1, help="How many held-out dialogues of ten utterances.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Which dialogues; every seed is another set.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw accuracy by turn and one dialogue into this image.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Hear spoken two-person dialogues with a tiny Qwen2-Audio, without memory and with it.

    An emotion is a shift from how a speaker usually sounds: one utterance alone is ambiguous, and the past resolves it.
    """
    import tempfile

    if plot is not None:
        _check_plot(plot)
    quiet_transformers()
    from mal_adapter.demo.run import describe_report, plot_report, run_demo

    with tempfile.TemporaryDirectory(prefix="mal-adapter-demo-") as folder:
        report = run_demo(dialogues, seed, Path(folder), progress=not as_json and sys.stderr.isatty())
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        typer.echo(describe_report(report))
    if plot is not None:
        plot_report(report, plot)
        typer.echo(f"plot: {plot}", err=as_json)


def _check_plot(plot: Path) -> None:
    """Refuse before the work, not after it."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise typer.BadParameter("plots need matplotlib: pip install 'mal-adapter[plot]'", param_hint="--plot")
    if plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"{plot} is not a .png, .svg or .pdf file", param_hint="--plot")
    if not plot.absolute().parent.is_dir():
        raise typer.BadParameter(f"the folder {plot.absolute().parent} does not exist", param_hint="--plot")
