"""Imports go one way, every module says what it offers, and looking at the package costs no seconds."""

import ast
import graphlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import mal_adapter

ROOT = Path(mal_adapter.__file__).parents[1]
# Each may import only from those before it.
CORE = ["errors", "forking", "config", "atomic", "files", "state", "stores", "precision", "gates32", "gates", "chunk"]
CORE += ["update", "reference", "baselines", "card", "format", "hub", "pretrained", "adapter", "hosts", "remote"]
CORE += ["families", "detection", "unsaved", "session_states", "sessions", "blocks", "rows", "checkpointing", "hooks"]
CORE += ["checks", "attach"]
ORDER = [*CORE, "", "ser", "demo", "cli"]  # "" is the package itself, whose names ser and demo use


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


TREES = {module_name(path): ast.parse(path.read_text()) for path in sorted((ROOT / "mal_adapter").rglob("*.py"))}
PACKAGES = {name for name in TREES if any(other.startswith(f"{name}.") for other in TREES)}


def imports(name: str) -> list[tuple[str, str | None]]:
    """(module, name) of each import from mal_adapter anywhere in a module, within functions and `if` too; the name is
    None where a module itself is imported."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            here = name.split(".")[: None if name in PACKAGES else -1]
            base = [*here[: len(here) - node.level + 1], node.module] if node.level else [node.module]
            module = ".".join(part for part in base if part)
            for alias in node.names:
                inside = f"{module}.{alias.name}"
                found.append((inside, None) if inside in TREES else (module, alias.name))
    return [(module, taken) for module, taken in found if module.split(".")[0] == "mal_adapter"]


def offered(name: str) -> list[str]:
    """A module's `__all__`."""
    for node in TREES[name].body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise AssertionError(f"{name} has no __all__")


@pytest.mark.parametrize("name", TREES)
def test_imports_go_one_way(name: str):
    parts = {(*module.split("."), "")[1] for module, _ in imports(name)}
    part = (*name.split("."), "")[1]
    if part == "":
        assert parts <= set(CORE)
    else:
        assert parts <= {*ORDER[: ORDER.index(part)], part}


def test_no_module_imports_itself_through_others():
    graph = {name: {module for module, _ in imports(name)} - {name} for name in TREES}
    graphlib.TopologicalSorter(graph).prepare()  # raises with the circle


@pytest.mark.parametrize("name", [name for name in TREES if not name.endswith("__main__")])
def test_a_module_says_what_others_may_take(name: str):
    module = importlib.import_module(name)
    assert [n for n in offered(name) if not hasattr(module, n) and f"{name}.{n}" not in TREES] == []
    undeclared = [(module, n) for module, n in imports(name) if n is not None and n not in offered(module)]
    assert undeclared == []


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_is_looked_at_without_torch():
    assert (
        fresh("import sys, mal_adapter, mal_adapter.cli, mal_adapter.ser; print('torch' in sys.modules)") == "False\n"
    )


def test_attaching_is_imported_in_no_time():
    code = (
        "import sys, torch, transformers; before = set(sys.modules); from mal_adapter import attach_memory; "
        "print(*{m.split('.')[0] for m in sys.modules.keys() - before} - sys.stdlib_module_names)"
    )
    # Nothing of torch either: torch._dynamo alone takes as long to import as all the rest of it.
    assert set(fresh(code).split()) <= {"jaxtyping", "mal_adapter", "numpy", "safetensors", "wadler_lindig"}


def test_all_public_names_are_there():
    assert set(mal_adapter.__all__) <= set(dir(mal_adapter))
    assert mal_adapter.__version__ == importlib.metadata.version("mal-adapter")
    with pytest.raises(AttributeError, match="has no attribute 'attach_memories'"):
        mal_adapter.attach_memories  # noqa: B018
