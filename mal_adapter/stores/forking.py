"""New locks in a forked process: a lock that another thread held at the fork would never be released there."""

import os
from typing import Protocol
from weakref import WeakValueDictionary

__all__ = ["renew_after_fork"]


class _Owner(Protocol):
    def _renew_locks(self) -> None: ...


_OWNERS: "WeakValueDictionary[int, _Owner]" = WeakValueDictionary()  # by identity: mappings have no hash


def renew_after_fork(owner: _Owner) -> None:
    """Call `owner._renew_locks()` in every process that is forked from this one."""
    _OWNERS[id(owner)] = owner


def _renew() -> None:
    for owner in tuple(_OWNERS.values()):
        owner._renew_locks()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_renew)
