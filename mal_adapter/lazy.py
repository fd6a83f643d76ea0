"""Names of a package that are imported when they are first used, since torch takes seconds to import."""

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib import import_module
from typing import Any

from mal_adapter.extras import explain_missing

__all__ = ["lazy_names"]


def lazy_names(package: str, modules: Mapping[str, str], *, extra: str | None = None) -> Callable[[str], Any]:
    """A `__getattr__` for `package` that imports each name from its module when it is first used.

    Args:
        package: The `__name__` of the package.
        modules: The module of each name, relative to `mal_adapter`.
        extra: The extra of mal-adapter that installs what these modules import; None if they need none.
    """

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with nullcontext() if extra is None else explain_missing(name, extra=extra):
            module = import_module(f"mal_adapter.{modules[name]}")
        value = getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    return load
