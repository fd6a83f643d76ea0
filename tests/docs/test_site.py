"""The site builds without a warning, its links are right, and every public name is documented."""

import importlib
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import mal_adapter.ser
from tests.docs.pages import DOCS

pytest.importorskip("sphinx", reason="the site needs the extra docs")

PUBLIC = ["mal_adapter", *(f"mal_adapter.{part}" for part in ("errors", "stores", "demo"))]
PUBLIC += [f"mal_adapter.ser.{part}" for part in ("recognizer", "dialogue", "training", "loading")]


class Page(HTMLParser):
    """The ids and the link targets of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids |= {found[name] or "" for name in ("id", "name") if name in found}
        self.targets += [found[name] or "" for name in ("href", "src") if name in found]


@pytest.mark.slow
def test_the_site_builds_with_right_links_and_all_public_names(tmp_path: Path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-E", "-d", tmp_path / "doctrees"]
    done = subprocess.run([*command, "-b", "html", DOCS, site], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    pages = {path: Page(path) for path in site.rglob("*.html")}
    broken, fetched = [], []
    for path, page in pages.items():
        for target in page.targets:
            address = urlsplit(target)
            if address.scheme or address.netloc:
                continue
            file = (path.parent / unquote(address.path)).resolve() if address.path else path
            there = file.exists() and (not address.fragment or file not in pages or _has(pages[file], address.fragment))
            if not there:
                broken.append(f"{path.relative_to(site)}: {target}")
        text = path.read_text()
        fetched += [path.name for mark in ('src="http', "@import", "cdn.") if mark in text]
    assert not broken
    assert not fetched  # no script and no font is loaded from another site

    documented = _inventory(site / "objects.inv")
    for module in PUBLIC:
        names = {f"{module}.{name}" for name in importlib.import_module(module).__all__}
        assert names <= documented, f"docs/api lacks {sorted(names - documented)}"
    short = {name.rpartition(".")[2] for name in documented}
    assert {*mal_adapter.ser.__all__} <= short, f"docs/api lacks {sorted({*mal_adapter.ser.__all__} - short)}"
    assert str(Path.home()) not in (site / "api" / "demo.html").read_text()


def _has(page: Page, fragment: str) -> bool:
    return unquote(fragment) in page.ids or fragment in ("", "top")


def _inventory(path: Path) -> set[str]:
    """The names in Sphinx's objects.inv: four lines of text, then compressed lines that begin with a name."""
    compressed = path.read_bytes().split(b"\n", 4)[4]
    return {line.split(" ")[0] for line in zlib.decompress(compressed).decode().splitlines()}
