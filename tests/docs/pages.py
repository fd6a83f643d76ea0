"""The project's pages, and the code blocks in them."""

import re
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["DOCS", "NEEDS_WEIGHTS", "PAGES", "ROOT", "Block", "blocks", "name_of", "prose", "run"]

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)]

NEEDS_WEIGHTS = "<!-- needs weights -->"
"""A block after this line is not run, since it needs a checkpoint or a host of the reader's."""

_FENCE = re.compile(r"^```(?P<language>[\w{}:-]*)[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    code: str
    line: int
    """The line of the page on which the code begins."""
    needs_weights: bool


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[Block]:
    """The page's blocks in these languages, in their order."""
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()].rstrip().rpartition("\n")[2].strip()
        line = text[: match.start("code")].count("\n") + 1
        found.append(Block(match["language"], match["code"], line, before == NEEDS_WEIGHTS))
    return [block for block in found if block.language in languages]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def run(page: Path) -> None:
    """Run the page's Python in this process as one program, without what needs weights. A traceback names its lines."""
    namespace: dict[str, Any] = {}
    for block in blocks(page, "python"):
        if not block.needs_weights:
            exec(compile("\n" * (block.line - 1) + block.code, name_of(page), "exec"), namespace)
