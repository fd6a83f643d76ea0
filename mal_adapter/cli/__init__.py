"""The `mal-adapter` command: what is asked for, and how the answer is printed; a file per command.

Imports that take seconds (torch, transformers) stay inside the commands, so that `--help` is quick.
"""

import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from mal_adapter.cli.adapters import inspect, pull, push
from mal_adapter.cli.demo import demo
from mal_adapter.cli.evaluate import evaluate, report
from mal_adapter.cli.failures import guarded, plain_warnings
from mal_adapter.cli.output import take_any_text
from mal_adapter.cli.predict import predict
from mal_adapter.cli.states import states
from mal_adapter.cli.train import train
from mal_adapter.cli.usage import Group, add, examples, prose

__all__ = ["app", "main"]

app = typer.Typer(
    name="mal-adapter",
    cls=Group,
    help=prose(
        """Emotions of a spoken dialogue, from an audio language model with a memory.

        Without one, the model hears each utterance alone. The memory tells it how this speaker usually sounds, and
        what was felt before."""
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    epilog=examples(
        ("See it work, with what comes with the package", "mal-adapter demo"),
        ("One call, its sound files in the order spoken", "mal-adapter predict turn1.wav turn2.wav"),
    )
    + """

Exit codes
  0    done
  1    an error; one line on stderr says which
  2    wrong usage, or an input file that can't be read
  130  stopped by Ctrl-C
  141  whoever read the output left, as with | head

Environment
  HF_TOKEN, HF_HOME      of the Hugging Face Hub: who you are, where files lie
  HF_HUB_OFFLINE=1       nothing is fetched; what was fetched before is used
  CUDA_VISIBLE_DEVICES   the GPUs that may be used; empty for none
  NO_COLOR, FORCE_COLOR  no colours, or colours into a pipe too""",
)
for command in (demo, predict, train, evaluate, report, push, pull, inspect):
    add(app, command)
app.add_typer(states, name="states", rich_help_panel="Keep and share")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script: runs one command and exits, as `mal-adapter --help` says with which code.

    Args:
        arguments: those of the process unless given.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = words[: words.index("--")] if "--" in words else words
    debug = "--debug" in options
    # Whoever is told to run it again with --debug puts that at the end, where a command's own options are.
    words = [word for word in options if word != "--debug"] + words[len(options) :]
    take_any_text()
    with guarded(as_json="--json" in options, debug=debug), plain_warnings():
        app(words, prog_name="mal-adapter")
    sys.exit()


def _print_versions(wanted: bool) -> None:
    if wanted:
        from platform import python_version

        from mal_adapter.serialization.versions import installed_version

        typer.echo(f"Python {python_version()}")
        for package in ("mal-adapter", "torch", "transformers", "huggingface-hub"):
            # mal-adapter itself may be a source tree that is not installed.
            typer.echo(f"{package} {installed_version(package) or 'unknown'}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the versions of what runs here, and exit.",
            callback=_print_versions,
            is_eager=True,
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error comes from; anywhere on the line.")
    ] = False,
) -> None:
    pass
