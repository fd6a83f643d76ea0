"""Every link of a page is right: its file and heading exist, or its address is well formed."""

import re
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.docs.pages import DOCS, PAGES, name_of, prose

_LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^()\s]+(?:\([^()\s]*\))?)\)")
_IMAGE = re.compile(r"^```\{image\} (?P<target>\S+)$", re.MULTILINE)


def links(page: Path) -> list[str]:
    text = re.sub(r"`[^`]*`", "code", prose(page))
    return [m["target"] for m in (*_LINK.finditer(text), *_IMAGE.finditer(page.read_text()))]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and MyST give to the headings."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        found.add(slug if not seen[slug] else f"{slug}-{seen[slug]}")
        seen[slug] += 1
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_target_of_each_link_exists(page: Path):
    wrong = []
    for target in links(page):
        address = urlsplit(target)
        if address.scheme:
            if address.scheme != "https" or "." not in (address.hostname or ""):
                wrong.append(target)
            continue
        file = (page.parent / address.path).resolve() if address.path else page
        if not file.exists() or (address.fragment and address.fragment not in anchors(file)):
            wrong.append(target)
    assert not wrong


def test_links_are_found():
    found = {name_of(page): links(page) for page in PAGES}
    assert sum(map(len, found.values())) > 80
    assert "docs/demo.png" in found["README.md"]
    assert "pictures/hooks.svg" in found["docs/how_it_works.md"]


def test_the_index_links_to_every_page():
    pages = {page.name for page in DOCS.glob("*.md")} - {"index.md", "changelog.md"}
    assert pages <= set(links(DOCS / "index.md"))
