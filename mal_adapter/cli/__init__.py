"""The `mal-adapter` command: what is asked for, and how the answer is printed; a file per command.

Imports that take seconds (torch, transformers) stay inside the commands, so that `--help` is quick.
"""

import sys
from typing import Annotated

import typer

import mal_adapter
from mal_adapter.cli.adapters import inspect, pull, push
from mal_adapter.cli.demo import demo
from mal_adapter.cli.evaluate import evaluate, report
from mal_adapter.cli.output import complain
from mal_adapter.cli.predict import predict
from mal_adapter.cli.states import states
from mal_adapter.cli.train import train

__all__ = ["app", "main"]

app = typer.Typer(
    name="mal-adapter",
    help="Emotions of a spoken dialogue, from an audio language model with a memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, predict, train, evaluate, report, push, pull, inspect):
    app.command()(command)
app.add_typer(states, name="states")


def main() -> None:
    """The console script: runs the command; errors of this library are one line on stderr and exit code 1."""
    from mal_adapter.errors import MalAdapterError

    try:
        app()
    except MalAdapterError as error:
        complain(error)
        sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(mal_adapter.__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass
