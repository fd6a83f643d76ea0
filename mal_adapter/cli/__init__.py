"""The `mal-adapter` command: options are parsed and results are printed here, in one file per command.

Slow imports (torch, transformers) are inside the commands, so that `--help` is quick.
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
from mal_adapter.cli.serve import serve
from mal_adapter.cli.simulate import simulate
from mal_adapter.cli.states import states
from mal_adapter.cli.timeline import timeline
from mal_adapter.cli.train import train
from mal_adapter.cli.usage import Group, add, examples, prose

__all__ = ["app", "main"]

app = typer.Typer(
    name="mal-adapter",
    cls=Group,
    help=prose(
        """Recognise the emotions of a spoken dialogue with an audio language model that has a memory.

        Without a memory, the model processes each utterance alone. The memory adds how this speaker usually sounds and
        what the speakers felt before."""
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    epilog=examples(
        ("A demonstration with the model in the package", "mal-adapter demo"),
        ("One call, its sound files in the order of speaking", "mal-adapter predict turn1.wav turn2.wav"),
    )
    + """

Exit codes
  0    done
  1    an error; one line on stderr says which
  2    wrong usage, or an input file that can't be read
  130  stopped by Ctrl-C
  141  the reader of the output closed it, as with | head

Environment
  HF_TOKEN, HF_HOME      of the Hugging Face Hub: your token, the download folder
  HF_HUB_OFFLINE=1       download nothing; use earlier downloads
  CUDA_VISIBLE_DEVICES   the GPUs that may be used; empty for none
  NO_COLOR, FORCE_COLOR  no colours, or colours into a pipe too""",
)
for command in (demo, predict, timeline, simulate, train, evaluate, report, serve, push, pull, inspect):
    add(app, command)
app.add_typer(states, name="states", rich_help_panel="Keep and share")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit; `mal-adapter --help` lists the exit codes.

    Args:
        arguments: Default: the arguments of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = words[: words.index("--")] if "--" in words else words
    debug = "--debug" in options
    # After a message that recommends --debug, people append it, among the options of the command.
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
            help="Print the versions of Python and the libraries, and exit.",
            callback=_print_versions,
            is_eager=True,
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; accepted anywhere on the line.")
    ] = False,
) -> None:
    pass
