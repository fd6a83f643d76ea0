"""The layout of `--help`: commands in panels, examples below the options, and no type for flags."""

import inspect
import os
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["Group", "add", "as_typed", "examples", "prose", "shown"]

_Function = TypeVar("_Function", bound=Callable[..., None])
_SHOWN: dict[Callable[..., None], tuple[str, str]] = {}


def shown(panel: str, *pairs: tuple[str, str]) -> Callable[[_Function], _Function]:
    """Decorate a command with its panel in the help of its group, and the examples in its own help."""

    def keep(command: _Function) -> _Function:
        _SHOWN[command] = panel, examples(*pairs)
        return command

    return keep


def add(app: typer.Typer, command: Callable[..., None], name: str | None = None) -> None:
    """Add a command that is decorated by `shown` to an app."""
    panel, epilog = _SHOWN[command]
    app.command(name, cls=_Command, help=prose(command.__doc__ or ""), epilog=epilog, rich_help_panel=panel)(command)


def examples(*pairs: tuple[str, str]) -> str:
    """The examples at the end of a command's help.

    Args:
        pairs: A task, and the command that does it, in lines of at most 76 columns.
    """
    blocks = ["{}:\n  {}".format(wanted, command.replace("\n", "\n    ")) for wanted, command in pairs]
    return "\n\n".join(["Examples", *blocks])


def prose(text: str) -> str:
    """A docstring with one line per paragraph, which the terminal wraps."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(text).split("\n\n"))


def as_typed(text: str) -> str:
    """Decode an argument of the command line as UTF-8, also where Python assumes ASCII.

    With LC_ALL=C and without Python's UTF-8 mode, each byte of 高兴 is a surrogate, which no tokenizer accepts. Use it
    for labels, questions and ids, but not for paths.

    Example:
        >>> as_typed("calm,\\udcc3\\udca9nerv\\udcc3\\udca9")
        'calm,énervé'
    """
    try:
        return os.fsencode(text).decode()
    except UnicodeError:  # already Unicode, or in another encoding
        return text


class _PlainFlags:
    def get_params(self, ctx: Any) -> Any:
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""  # typer 0.29 would print a type
            if getattr(param, "rich_help_panel", None) is None and self._last_panel and "--help" in param.opts:
                param.rich_help_panel = self._last_panel
        return params

    _last_panel: str | None = None


class _Command(_PlainFlags, TyperCommand):
    _last_panel = "Output"


class Group(_PlainFlags, TyperGroup):
    """A group of commands."""
