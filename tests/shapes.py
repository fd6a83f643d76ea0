"""While tests run, the shapes that annotations promise are checked at every call: see `check_shapes` in conftest.py."""

import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import beartype
from jaxtyping import AbstractArray, install_import_hook

import mal_adapter  # of it, only the path is looked at: its modules are imported lazily

__all__ = ["check_shapes", "checker"]

#: What checks a user's tensors itself, and raises errors of its own that tests ask for.
CHECK_THEMSELVES = {
    "AttachedMemory.session",
    "MemoryAdapter.read",
    "MemoryAdapter.write",
    "MemoryAdapter.read_tokens",
    "MemoryAdapter.write_tokens",
    "MemoryAdapter._flat",
    "_spans",
}


def check_shapes() -> None:
    """From now on, modules of the package that name shapes are imported with every such function checked."""
    package = Path(mal_adapter.__file__).parent
    files = [path for path in package.rglob("*.py") if "from jaxtyping import" in path.read_text()]
    modules = [".".join(path.relative_to(package.parent).with_suffix("").parts) for path in files]
    install_import_hook(modules, "tests.shapes.checker")


def checker(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype's check of the shapes that `function` names, and of nothing else: to look into a mapping whether it
    holds what it should may ask a server."""
    shaped = {name: hint for name, hint in function.__annotations__.items() if _is_shaped(hint)}
    if not shaped or function.__qualname__ in CHECK_THEMSELVES:
        return function
    function.__annotations__ = shaped
    return beartype.beartype(function)


def _is_shaped(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(map(_is_shaped, typing.get_args(hint)))
