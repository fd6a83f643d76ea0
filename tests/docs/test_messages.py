"""Every message that the troubleshooting page quotes is in the code of the library."""

import ast
from pathlib import Path

import pytest

import mal_adapter
from tests.docs.pages import DOCS, blocks

QUOTED = [block.code.strip() for block in blocks(DOCS / "troubleshooting.md", "text")]


def messages() -> list[str]:
    """All strings of the library, with `…` for each value that is inserted."""
    found = []
    for path in Path(mal_adapter.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
    return [" ".join(message.split()) for message in found]


MESSAGES = messages()


@pytest.mark.parametrize("quoted", QUOTED, ids=lambda text: text[:50])
def test_a_quoted_message_is_in_the_code(quoted: str):
    parts = [part for part in (p.strip() for p in quoted.split("…")) if len(part) > 3]
    assert any(_in_order(parts, message) for message in MESSAGES)


def _in_order(parts: list[str], message: str) -> bool:
    at = 0
    for part in parts:
        at = message.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


def test_the_page_quotes_messages():
    assert len(QUOTED) > 20
    assert not any(_in_order(["this message is nowhere in the library"], message) for message in MESSAGES)
