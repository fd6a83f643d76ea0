"""Every `mal-adapter` command on a page can be parsed, and every module that a page runs exists."""

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from mal_adapter.cli import app
from tests.docs.pages import PAGES, blocks, name_of, prose

LAUNCHED = ["accelerate", "launch", "-m", "mal_adapter.cli"]


class Shown(NamedTuple):
    page: Path
    words: list[str]
    whole: bool
    """Whether the page shows the whole command, as in a block; prose may leave out options."""


def shown() -> list[Shown]:
    found = []
    for page in PAGES:
        for block in blocks(page, "sh"):
            # A quoted newline is part of an argument; the rest of a line after ` #` is a comment.
            code = re.sub(r"\s#\s.*$", "", block.code.replace("\\\n", " "), flags=re.MULTILINE)
            for words in _simple_commands(code):
                found.append(Shown(page, words, "…" not in words))
        for span in re.findall(r"(?<!`)`((?:mal-adapter|accelerate launch|python -m) [^`]+)`", prose(page)):
            found.append(Shown(page, shlex.split(" ".join(span.split())), whole=False))
    return found


def _simple_commands(code: str) -> list[list[str]]:
    lexer = shlex.shlex(code, posix=True, punctuation_chars=";&|\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(";&|\n"):
            commands.append([])
        else:
            commands[-1].append(word)
    return [words for words in commands if words]


COMMANDS = [
    Shown(page, words[4:] if words[:4] == LAUNCHED else words[1:], whole)
    for page, words, whole in shown()
    if words[0] == "mal-adapter" or words[:4] == LAUNCHED
]
MODULES = sorted({words[2] for _, words, _ in shown() if words[:2] == ["python", "-m"]})


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{name_of(c.page)}: {' '.join(c.words)[:60]}")
def test_a_command_and_its_options_exist(command: Shown):
    parser: Any = typer.main.get_command(app)  # click's, or the copy of it in newer typer
    words = [word for word in command.words if word != "…"]
    while hasattr(parser, "commands") and words and not words[0].startswith("-"):
        name, *words = words
        assert name in parser.commands, f"there is no command {name}"
        parser = parser.commands[name]
    given, rest, _ = parser.make_parser(parser.context_class(parser)).parse_args(words)
    assert not rest
    if command.whole:
        missing = [p.name for p in parser.params if p.required and given.get(p.name) in (None, (), [])]
        assert not missing, f"{' '.join(command.words)} needs {missing}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_that_a_page_runs_exists(module: str):
    found = importlib.util.find_spec(module)
    assert found is not None
    assert found.submodule_search_locations is None or importlib.util.find_spec(f"{module}.__main__") is not None


def test_commands_are_found():
    names = {command.words[0] for command in COMMANDS if command.words}
    assert names >= {"demo", "predict", "train", "evaluate", "report", "push", "states", "inspect"}
    assert sum(command.whole for command in COMMANDS) >= 5
    assert MODULES
