"""The code on every page runs, from the top of the page to its end; test_readme.py runs README.md and index.md."""

import ast
import builtins
import importlib
import inspect
import shutil
import warnings
from pathlib import Path

import pytest

from mal_adapter.demo import ADAPTER_FOLDER
from mal_adapter.errors import IncompleteCorpusWarning
from tests.docs.pages import DOCS, PAGES, blocks, name_of, run
from tests.ser.made_corpora import make_iemocap, make_meld
from tests.ser.training_world import make_dialogues

WITH_CODE = [
    page
    for page in PAGES
    if page.is_relative_to(DOCS) and blocks(page, "python") and page.name != "index.md"  # which is the README's
]
MARKED = [(page, block) for page in PAGES for block in blocks(page, "python") if block.needs_weights]
THE_READERS = {"model", "inputs", "mask"}
"""Names that code which needs weights may use without defining them."""


def prepare(page: Path) -> None:
    """Put into the working folder what the page assumes: corpora, or an adapter that one of its commands trains."""
    if page.name == "corpora.md":
        make_meld(Path("MELD.Raw"), {"train": (2, 2), "dev": (2,), "test": (2,)})
        make_iemocap(Path("IEMOCAP_full_release"), 2, (2,))
        make_dialogues(Path("calls"), (2, 2))
    if page.name == "train_your_own.md":
        shutil.copytree(ADAPTER_FOLDER, "my-memory")


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_a_page_runs_as_one_program(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    prepare(page)
    with warnings.catch_warnings():
        if page.name == "corpora.md":
            warnings.simplefilter("ignore", IncompleteCorpusWarning)
        run(page)


def test_pages_have_code_and_little_of_it_needs_weights():
    assert len(WITH_CODE) >= 5
    assert len(MARKED) <= 3


@pytest.mark.parametrize(("page", "block"), MARKED, ids=lambda value: name_of(value) if isinstance(value, Path) else "")
def test_code_that_needs_weights_uses_names_that_exist(page: Path, block):
    tree = ast.parse(block.code)
    known = {*dir(builtins), *THE_READERS}
    ours = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                ours[alias.asname or alias.name] = getattr(module, alias.name)
        if isinstance(node, ast.Import):
            known |= {alias.asname or alias.name for alias in node.names}
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            known.add(node.id)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    assert used <= known | ours.keys()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ours:
            given = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            inspect.signature(ours[node.func.id]).bind_partial(*node.args, **given)
