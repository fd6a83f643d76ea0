"""The pictures show what the library does today: the tests measure their figures again and draw them again."""

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import DOCS

PICTURES = DOCS / "pictures"
FIGURES = json.loads((PICTURES / "figures.json").read_text())


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch):
    """The scripts of the pictures import each other by plain names; these modules are removed afterwards."""
    monkeypatch.syspath_prepend(str(PICTURES))
    yield
    for name in {path.stem for path in PICTURES.glob("*.py")} - {"__main__"}:
        sys.modules.pop(name, None)


def same(kept: Any, found: Any) -> bool:
    if isinstance(kept, dict):
        return kept.keys() == found.keys() and all(same(kept[key], found[key]) for key in kept)
    if isinstance(kept, list):
        return len(kept) == len(found) and all(map(same, kept, found))
    return kept == (pytest.approx(found, rel=0.02, abs=0.01) if isinstance(kept, float) else found)


@pytest.mark.parametrize("name", FIGURES)
def test_a_new_measurement_gives_the_same_figures(name: str):
    assert same(FIGURES[name], importlib.import_module(name).measure())


def test_the_files_are_what_the_scripts_draw(tmp_path: Path):
    style = importlib.import_module("style")
    drawn = {"hooks": importlib.import_module("hooks").draw()}
    drawn |= {name: importlib.import_module(name).draw(figures) for name, figures in FIGURES.items()}
    assert {path.stem for path in PICTURES.glob("*.svg")} == drawn.keys()
    for name, figure in drawn.items():
        style.save(figure, tmp_path / f"{name}.svg")
        kept, found = ((folder / f"{name}.svg").read_text() for folder in (PICTURES, tmp_path))
        # not byte by byte: another processor may round a coordinate differently
        assert re.findall(r"<(\w+)", kept) == re.findall(r"<(\w+)", found), f"run python docs/pictures: {name}"


@pytest.mark.slow
def test_the_page_of_a_call_can_be_drawn_again(tmp_path: Path):
    script = importlib.import_module("timeline_page")
    if script.CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    script.draw(tmp_path / "timeline.png")
    kept, found = ((folder / "timeline.png").read_bytes() for folder in (DOCS, tmp_path))
    assert kept[:24] == found[:24]  # a PNG of the same size
    assert len(kept) <= 200_000
    assert 0.5 < len(kept) / len(found) < 2  # another machine has other fonts
