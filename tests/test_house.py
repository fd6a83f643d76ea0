"""Imports go one way, and looking at the package costs no seconds."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mal_adapter

PACKAGE = Path(mal_adapter.__file__).parent
# Each may import only from those before it.
CORE = ["errors", "config", "atomic", "files", "state", "stores", "gates", "chunk", "update", "reference", "baselines"]
CORE += ["card", "format", "hub", "pretrained", "adapter"]
CORE += ["hosts", "remote", "families", "detection", "sessions", "rows", "checkpointing", "hooks", "attach"]
ORDER = [*CORE, "", "ser", "demo", "cli"]  # "" is the package itself, whose names ser and demo use


def imported(path: Path) -> set[str]:
    """The top-level parts of mal_adapter that a file imports."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mal_adapter"):
            inside = (node.module or "").split(".")[1:]
            names = {alias.name for alias in node.names}
            parts |= {inside[0]} if inside else names & {"ser", "demo", "cli"} or {""}
        if isinstance(node, ast.Import):
            parts |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("mal_adapter.")}
    return parts


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    part = "" if part == "__init__" else part
    if part == "" or path == PACKAGE / "__init__.py":
        assert imported(path) <= set(CORE)
        return
    # ser's example snippets and type hints may name the package; demo builds on ser
    assert imported(path) <= set(ORDER[: ORDER.index(part)]) | {part}


def test_the_package_is_looked_at_without_torch():
    code = "import sys, mal_adapter, mal_adapter.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_all_public_names_are_there():
    assert all(hasattr(mal_adapter, name) for name in mal_adapter.__all__)
    assert mal_adapter.__all__ == sorted(mal_adapter.__all__)
