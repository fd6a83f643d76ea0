"""Names of a package that are imported when they are first used, since torch takes seconds to import."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for `package` that imports each name from its module when it is first used.

    Args:
        package: The `__name__` of the package.
        modules: The module of each name, relative to `mal_adapter`.
    """

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"mal_adapter.{modules[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return load
