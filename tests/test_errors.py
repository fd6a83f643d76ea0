"""The errors and warnings: all are exported, drawn in the tree and on the page, and one type says what to install."""

import inspect
import re
import subprocess
import sys

import pytest

import mal_adapter.ser
from mal_adapter import errors
from mal_adapter.errors import ConfigError, MalAdapterError, MalAdapterWarning, MissingDependencyError
from mal_adapter.extras import explain_missing, missing_dependency, require
from mal_adapter.ser.loading import load_host
from tests.docs.pages import DOCS

OWN = dict(inspect.getmembers(errors, lambda value: inspect.isclass(value) and value.__module__ == errors.__name__))
BASES = (MalAdapterError, MalAdapterWarning)


def test_all_errors_and_warnings_are_exported():
    assert set(errors.__all__) == {*OWN, "raise_problems"}
    assert errors.__all__ == sorted(errors.__all__)
    assert all(issubclass(kind, BASES) for kind in OWN.values())


def drawn_tree() -> dict[str, tuple[str, ...]]:
    """The bases of each class, by the tree in the docstring of the module."""
    parents: dict[int, str] = {}
    bases = {}
    for line in (errors.__doc__ or "").splitlines():
        match = re.fullmatch(r"    ([│├└─ ]*)(\w+)(?: \((\w+)\))?", line)
        if match is None:
            continue
        branches, name, builtin = match.groups()
        depth = len(branches) // 4
        parents[depth] = name
        bases[name] = tuple(filter(None, (parents[depth - 1] if depth else None, builtin)))
    return bases


def test_the_tree_in_the_docstring_is_the_tree_of_classes():
    real = {name: tuple(base.__name__ for base in kind.__bases__) for name, kind in OWN.items()}
    assert drawn_tree() == real | {"MalAdapterError": ()}


def test_the_page_of_errors_is_complete():
    page = (DOCS / "api" / "errors.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
    assert rows == sorted(OWN.keys() - {kind.__name__ for kind in BASES})
    assert ".. automodule:: mal_adapter.errors\n   :members:" in page


def test_a_missing_package_names_the_extra_and_is_an_import_error():
    with pytest.raises(MissingDependencyError, match=re.escape("pip install 'mal-adapter[redis]'")) as caught:
        require("a store", "json", "no_such_package", extra="redis")
    assert isinstance(caught.value, ImportError)
    assert caught.value.name == "no_such_package"
    assert missing_dependency("a store", "json", extra="redis") is None


def test_an_import_of_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingDependencyError, match="scikit-learn") as caught, explain_missing("it", extra="train"):
        import sklearn.metrics  # noqa: F401
    assert caught.value.name == "sklearn"
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize("statement", ["import mal_adapter.no_such_module", "from mal_adapter import no_such_name"])
def test_a_fault_of_the_library_itself_is_not_a_missing_package(statement: str):
    with pytest.raises(ImportError) as caught, explain_missing("it", extra="train"):
        exec(statement)
    assert not isinstance(caught.value, MissingDependencyError)


NEEDED = [
    ("accelerate", "from mal_adapter.ser import train_memory"),
    ("accelerate", "from mal_adapter.ser.training import train_memory"),
    ("accelerate", "from mal_adapter.ser.evaluation import evaluate"),
    ("sklearn", "from mal_adapter.ser import train_memory"),
    ("sklearn", "from mal_adapter.ser import LabelSet, score; score(['a'], ['a'], [1], LabelSet(['a', 'b']))"),
    ("matplotlib", "from mal_adapter.demo.run import plot_report; plot_report(None, None)"),
    ("redis", "from mal_adapter.stores import RedisStore; RedisStore('redis://host')"),
]
# Each attempt begins as in a new process, but torch is imported once for all of them.
ATTEMPTS = """
import sys
for package, code in NEEDED:
    for name in [name for name in sys.modules if name.partition(".")[0] in (package, "mal_adapter")]:
        del sys.modules[name]
    sys.modules[package] = None
    try:
        exec(code)
    except Exception as error:
        print(type(error).__name__, error)
    del sys.modules[package]
"""


def test_each_part_that_needs_an_extra_says_so():
    done = subprocess.run([sys.executable, "-c", f"NEEDED = {NEEDED!r}{ATTEMPTS}"], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(NEEDED), done.stderr
    for (package, _), line in zip(NEEDED, lines, strict=True):
        assert line.startswith("MissingDependencyError ")
        assert re.search(rf"{package.replace('sk', 'scikit-')}.*pip install 'mal-adapter\[(train|plot|redis)\]'", line)


def test_a_device_map_needs_accelerate(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mal_adapter.extras.find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match="accelerate"):
        load_host("no/such-model", device_map="auto")


def test_several_problems_keep_the_type_of_the_first():
    problems = [missing_dependency("a report", "no_such_package", extra="train"), ConfigError("seed is -1")]
    with pytest.raises(MissingDependencyError, match=r"2 problems: .*no_such_package.*seed is -1"):
        errors.raise_problems(problems)


def test_names_of_the_package_that_need_no_extra_are_there():
    assert mal_adapter.ser.LabelSet
