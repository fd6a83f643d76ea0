"""The embedded server: emotions over HTTP from one model in one process, a session per call."""

from typing import TYPE_CHECKING

from mal_adapter.lazy import lazy_names

if TYPE_CHECKING:
    from mal_adapter.server.app import make_app
    from mal_adapter.server.keys import ApiKeys
    from mal_adapter.server.limits import Limits
    from mal_adapter.server.start import serve

__all__ = ["ApiKeys", "Limits", "make_app", "serve"]

if not TYPE_CHECKING:  # a checker that saw this function would take every misspelt name for an Any
    __getattr__ = lazy_names(
        __name__,
        {
            "ApiKeys": "server.keys",
            "Limits": "server.limits",
            "make_app": "server.app",
            "serve": "server.start",
        },
    )
