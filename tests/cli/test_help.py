"""`--help` is correct: its examples parse, its JSON fields exist and its lines fit; and it is quick."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from mal_adapter.cli import app
from mal_adapter.demo import ADAPTER_FOLDER
from mal_adapter.stores import FolderStore
from tests.commands import mal_adapter
from tests.stores.states import state_of


def commands(group: Any, *path: str) -> list[tuple[str, ...]]:
    """The words of every command and group, the outermost one included."""
    inner = getattr(group, "commands", {})
    return [path, *(found for name, command in inner.items() for found in commands(command, *path, name))]


ALL = commands(typer.main.get_command(app))


def shown_help(path: tuple[str, ...], columns: int, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    return CliRunner().invoke(app, [*path, "--help"]).stdout


def examples(text: str) -> list[list[str]]:
    """The arguments of each example in a help text, after `mal-adapter` or `accelerate launch -m mal_adapter.cli`."""
    whole = re.sub(r"\\ *\n +", "", text)
    lines = re.findall(r"^ {2,4}(?:mal-adapter|accelerate launch -m mal_adapter\.cli) (.+?) *$", whole, re.MULTILINE)
    return [shlex.split(line.split(" > ")[0]) for line in lines]


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_the_examples_are_whole_in_80_columns_and_parse(path, tmp_path, monkeypatch):
    text = shown_help(path, 80, monkeypatch)
    assert max(map(len, text.splitlines())) <= 80
    found = examples(text)
    assert found
    assert found == examples(shown_help(path, 200, monkeypatch))  # a width that breaks no line
    monkeypatch.chdir(tmp_path)
    Path("call-42.safetensors").touch()
    for folder in ("my-memory", "gru-evaluation", *(f"eval-{n}" for n in range(1, 6))):
        Path(folder).mkdir()
    for words in found:
        command, name = typer.main.get_command(app), "mal-adapter"
        context = command.make_context(name, list(words))
        while hasattr(command, "commands"):
            rest = [*getattr(context, "_protected_args", []), *context.args]
            name, command, rest = command.resolve_command(context, rest)
            context = command.make_context(name, rest, parent=context)
        assert (*path, name)[: len(path)] == tuple(words[: len(path)])


def test_the_help_lists_exit_codes_and_environment_variables(monkeypatch):
    text = shown_help((), 80, monkeypatch)
    assert re.findall(r"^ +(\d+)  ", text, re.MULTILINE) == ["0", "1", "2", "130", "141"]
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "NO_COLOR"):
        assert name in text


def fields(path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The fields in the help text of `--json`."""
    said = re.search(r"Print one JSON object: (.*?)\. ", shown_help(path, 500, monkeypatch))
    assert said is not None
    return set(re.findall(r"\w+", said[1]))


def test_the_json_output_has_no_fields_beyond_the_documented_ones(tmp_path, monkeypatch):
    state_of(2).save(tmp_path / "a.safetensors")
    FolderStore(tmp_path / "sessions").put("a", state_of(2))
    store = ["--store", tmp_path / "sessions"]
    for path, arguments in {
        ("inspect",): [[tmp_path / "a.safetensors"], [ADAPTER_FOLDER]],
        ("states", "list"): [store],
        ("states", "export"): [["a", tmp_path / "b", *store]],
        ("states", "import"): [["b", tmp_path / "a.safetensors", *store]],
        ("states", "drop"): [["a", *store]],
        ("demo",): [["--dialogues", "1"]],
        ("predict",): [[tmp_path / "none.wav"]],
        ("timeline",): [[tmp_path / "none.wav"]],
    }.items():
        for words in arguments:
            answer = json.loads(mal_adapter(*path, *words, "--json").stdout)
            assert "error" not in answer
            assert answer.keys() <= fields(path, monkeypatch), path


def test_version_lists_python_and_the_libraries():
    lines = mal_adapter("--version").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["Python", "mal-adapter", "torch", "transformers", "huggingface-hub"]
    assert all(line.split()[1][0].isdigit() for line in lines)


def test_help_and_completion_import_nothing_heavy(tmp_path):
    (tmp_path / "call%2F1.safetensors").touch()
    code = f"""
import os, sys
from mal_adapter.cli import main
def end(*words):
    try: main(words)
    except SystemExit: pass
end("--help"), end("train", "--help"), end("--version")
os.environ["_MAL_ADAPTER_COMPLETE"] = "complete_bash"
def complete(*words):
    os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = " ".join(words), str(len(words) - 1)
    print("->"), end()
complete("mal-adapter", "ins")
complete("mal-adapter", "evaluate", "mel")
complete("mal-adapter", "states", "export", "--store", {str(tmp_path)!r}, "ca")
heavy = {{"torch", "transformers", "matplotlib", "numpy", "tqdm", "huggingface_hub"}}
print("heavy:", sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"TERM": "dumb"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"
    completed = [part.split() for part in done.stdout.partition("->")[2].rpartition("heavy")[0].split("->")]
    assert completed == [["inspect"], ["meld"], ["call/1"]]
