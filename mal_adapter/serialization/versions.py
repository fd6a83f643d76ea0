"""Versions of installed packages."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["installed_version", "library_version"]


def installed_version(package: str) -> str | None:
    """The version of an installed package, or None if it is not installed.

    Example:
        >>> installed_version("a-package-that-is-not-installed") is None
        True
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def library_version() -> str:
    """The version of mal-adapter; "0+unknown" in a source tree that is not installed.

    Example:
        >>> import mal_adapter
        >>> library_version() == mal_adapter.__version__
        True
    """
    return installed_version("mal-adapter") or "0+unknown"
