"""The last act of a server: unsaved states are saved, within a limit of time."""

import logging
import threading

from mal_adapter.errors import MalAdapterError, SessionConflictError
from mal_adapter.stores.states import SessionStates

__all__ = ["FLUSH_S", "flush"]

log = logging.getLogger(__name__)

FLUSH_S = 10.0  # a store that hangs must not keep the process


def flush(states: SessionStates, timeout_s: float = FLUSH_S) -> bool:
    """Save all unsaved states. Returns whether all are saved; logs those that are not."""
    thread = threading.Thread(target=_flush, args=(states,), name="mal_adapter_flush", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if lost := states.unsaved:
        log.error("the last utterances of the sessions %s are lost: the store can't save them", lost)
    return not lost


def _flush(states: SessionStates) -> None:
    while True:
        try:
            return states.flush()
        except SessionConflictError as error:  # of one session; continue with the others
            log.error("another replica has continued a session, and the state of this replica is lost: %s", error)
        except MalAdapterError as error:
            return log.error("%s: %s", type(error).__name__, error)
