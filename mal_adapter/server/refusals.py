"""The server's answers to errors: a status, a type for programs and a sentence for people."""

from collections.abc import Mapping

from starlette.exceptions import HTTPException

from mal_adapter import errors

__all__ = ["AGAIN", "Refusal", "no_session", "refusal_of"]

AGAIN = {"Retry-After": "1"}  # seconds


class Refusal(HTTPException):
    """An answer other than success; its body is `{"type": kind, "detail": detail}`.

    Args:
        status: The HTTP status.
        kind: The type of the error, for programs.
        detail: What is wrong and what to do.
        headers: More headers.
    """

    def __init__(self, status: int, kind: str, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, detail, dict(headers or {}))
        self.kind = kind


def no_session() -> Refusal:
    """The answer to a request for a session that does not exist."""
    return Refusal(404, "session_not_found", "this session does not exist or has expired")


def refusal_of(error: Exception) -> Refusal:
    """The client's answer to an error. The error's own message may name folders and hosts, so it goes to the log only.

    Example:
        >>> refusal_of(errors.StoreError("can't read redis://10.0.0.7")).kind
        'store_unavailable'
    """
    if isinstance(error, Refusal):
        return error
    return next(Refusal(*reply) for kind, reply in _REPLIES.items() if isinstance(error, kind))


_CONFLICT = "another replica has continued this session; send the utterance again"
_REPLIES: dict[type[Exception], tuple[int, str, str, dict[str, str] | None]] = {
    errors.SessionError: (
        400,
        "invalid_session_id",
        "this is not a valid session id; use a short name of letters, digits, - and /",
        None,
    ),
    errors.SessionConflictError: (409, "session_conflict", _CONFLICT, None),
    errors.StoreError: (503, "store_unavailable", "sessions can't be read or saved now; send it again", AGAIN),
    errors.MalAdapterError: (
        500,
        "session_broken",
        "this session can't continue, see the server's log; delete it to start again",
        None,
    ),
    Exception: (500, "internal_error", "an error in the server, see its log", None),
}
