"""What a release is made of: the wheel a user installs, the source distribution, and what both say of themselves."""

import ast
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mal_adapter

pytest.importorskip("build", reason="a release needs the extra dev")

ROOT = Path(__file__).parents[1]
SOURCES = ["mal_adapter", "tests", "examples", "docs", ".ci"]
MADE_HERE = {"__pycache__", "_build", ".pytest_cache", ".DS_Store"}
NOT_PYTHON = {
    "mal_adapter/py.typed",
    "mal_adapter/ser/evaluation/report.html.j2",
    *(f"mal_adapter/ser/timeline/page.{suffix}" for suffix in ("html.j2", "css", "js")),
    *(f"mal_adapter/demo/files/adapter/{name}" for name in ("README.md", "config.json", "model.safetensors")),
    *(
        f"mal_adapter/demo/files/host/{name}"
        for name in (
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "preprocessor_config.json",
            "processor_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        )
    ),
}
FOR_DEVELOPERS = {"dev", "docs", "bench"}


def files_of(*folders: str) -> set[str]:
    found = (path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.as_posix() for path in found if not MADE_HERE & set(path.parts)}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel and the source distribution that it is made from."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(folder.iterdir())) == 2
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(dist: Path) -> Path:
    return next(dist.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Metadata:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Metadata.from_email(archive.read(name), validate=True)


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    own = {name for name in names if name.startswith("mal_adapter/")}
    assert own == files_of("mal_adapter")
    assert {name for name in own if not name.endswith(".py")} == NOT_PYTHON
    demo = {name.removeprefix("mal_adapter/demo/") for name in own if name.startswith("mal_adapter/demo/")}
    assert {name for name in demo if name.endswith(".py")} == {
        "__init__.py",
        "shipped.py",
        "dialogues.py",
        "run.py",
        "voices.py",
    }
    info = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    about = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    assert names - own == {f"{info}/{name}" for name in about}
    assert wheel.name.endswith("-py3-none-any.whl")


def test_the_source_distribution_holds_what_tests_and_pages_need(sdist: Path):
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    alone = {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "constraints.txt", ".gitignore", "PKG-INFO"}
    assert names == files_of(*SOURCES) | alone


def test_the_metadata_say_what_a_user_installs(metadata: Metadata, wheel: Path, sdist: Path):
    assert metadata.name == "mal-adapter"
    assert str(metadata.version) == mal_adapter.__version__, "the version is another now: pip install -e . once more"
    assert wheel.name.startswith(f"mal_adapter-{metadata.version}-")
    assert sdist.name == f"mal_adapter-{metadata.version}.tar.gz"
    assert str(metadata.requires_python) == ">=3.10"
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.license_files == ["LICENSE"]
    assert metadata.description_content_type == "text/markdown"
    assert (metadata.description or "").strip() == (ROOT / "README.md").read_text().strip()
    extras = re.search(r"\[project\.optional-dependencies\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.S)
    assert extras is not None
    assert set(metadata.provides_extra or ()) == set(re.findall(r"^([\w-]+) = \[", extras[1], re.M))
    assert set(metadata.provides_extra or ()) >= {*FOR_DEVELOPERS, "train", "plot", "redis"}


def test_the_command_is_there(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        assert archive.read(name).decode().split("\n")[:2] == [
            "[console_scripts]",
            "mal-adapter = mal_adapter.cli:main",
        ]
    assert callable(importlib.import_module("mal_adapter.cli").main)


def test_an_index_would_take_both(wheel: Path, sdist: Path):
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", wheel, sdist]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_changelog_and_citation_have_the_version(metadata: Metadata):
    """A release has a dated heading, what comes after the last one the heading without a date."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", changelog, re.M)
    assert headings[0] == ("Unreleased", "")
    assert all(date for _, date in headings[1:])
    version = metadata.version
    assert version.is_prerelease or (len(headings) > 1 and str(version) == headings[1][0])
    assert f"version = {{{version.base_version}}}" in (ROOT / "README.md").read_text()


def running(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that a type checker alone sees."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from running(node)


def imported(folder: str) -> dict[str, str]:
    """Top-level name of each import of another package -> a file that has it."""
    found = {}
    for name in files_of(folder):
        if name.endswith(".py"):
            for node in running(ast.parse((ROOT / name).read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0]: name for alias in node.names}
                if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                    found[node.module.split(".")[0]] = name
    return {name: file for name, file in found.items() if name not in {*sys.stdlib_module_names, "mal_adapter"}}


def test_what_the_package_imports_is_declared(metadata: Metadata):
    """Not found in a developer's environment, where everything is installed."""
    # torch for CUDA brings Triton along; only there the kernels are imported, see tests/memory/fused/test_support.py
    declared = {"triton"}
    for requirement in metadata.requires_dist or ():
        extra = re.search(r"extra == ['\"](.+?)['\"]", str(requirement.marker))
        if extra is None or extra[1] not in FOR_DEVELOPERS:
            declared.add(canonicalize_name(Requirement(str(requirement)).name))
    distributions = importlib.metadata.packages_distributions()
    undeclared = {
        name: file
        for name, file in imported("mal_adapter").items()
        if not declared & {canonicalize_name(distribution) for distribution in distributions.get(name, [name])}
    }
    assert undeclared == {}


@pytest.mark.slow
def test_an_example_runs_on_the_wheel_far_from_the_repository(wheel: Path, sdist: Path, tmp_path: Path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(pip, check=True, capture_output=True, timeout=120)
    with tarfile.open(sdist) as archive:
        (member,) = (member for member in archive if member.name.endswith("/examples/quickstart.py"))
        source = archive.extractfile(member)
        assert source is not None
        with source, open(tmp_path / "quickstart.py", "wb") as copy:
            shutil.copyfileobj(source, copy)
    code = f"""
import runpy, mal_adapter
assert mal_adapter.__file__.startswith({str(site)!r}), mal_adapter.__file__
runpy.run_path("quickstart.py", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 10
