"""Packages that only an extra of mal-adapter installs, and the error for those that are missing."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from mal_adapter.errors import MissingDependencyError

__all__ = ["explain_missing", "missing_dependency", "require"]

#: What to call a package whose import name is not its name in the registry.
_NAMES = {"sklearn": "scikit-learn", "redis": "redis-py"}


def missing_dependency(use: str, *packages: str, extra: str) -> MissingDependencyError | None:
    """The error for those of `packages` that are not installed; None if all are. Nothing is imported.

    Args:
        use: What needs the packages, such as "a report".
        packages: Import names.
        extra: The extra of mal-adapter that installs them.

    Example:
        >>> print(missing_dependency("a report", "numpy", "no_such_package", extra="train"))
        a report needs no_such_package, which is not installed: pip install 'mal-adapter[train]'
        >>> missing_dependency("a report", "numpy", extra="train") is None
        True
    """
    missing = [package for package in packages if find_spec(package) is None]
    return _error(use, missing, extra) if missing else None


def require(use: str, *packages: str, extra: str) -> None:
    """Raise `MissingDependencyError` unless all packages are installed. Arguments are those of `missing_dependency`."""
    if (error := missing_dependency(use, *packages, extra=extra)) is not None:
        raise error


@contextmanager
def explain_missing(use: str, *, extra: str) -> Iterator[None]:
    """Turn the `ModuleNotFoundError` of a package that is imported in the block into a `MissingDependencyError`.

    Args:
        use: What needs the package, such as "train_memory".
        extra: The extra of mal-adapter that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "mal_adapter"):  # a fault of this library, which no installation mends
            raise
        raise _error(use, [package], extra) from error


def _error(use: str, packages: list[str], extra: str) -> MissingDependencyError:
    names = ", ".join(_NAMES.get(package, package) for package in packages)
    are = "which is" if len(packages) == 1 else "which are"
    return MissingDependencyError(
        f"{use} needs {names}, {are} not installed: pip install 'mal-adapter[{extra}]'", name=packages[0]
    )
