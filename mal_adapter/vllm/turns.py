"""What a request says about its dialogue: `session_id` and `turn` in its sampling parameters' `extra_args`.

Over HTTP these are `vllm_xargs`. vLLM is not imported here: parameters are any object with `extra_args` and `n`.
"""

from typing import Any, NamedTuple

from mal_adapter.errors import SessionError
from mal_adapter.stores.base import encode_session_id

__all__ = ["LONGEST_ID", "SessionTurn", "check_id", "session_turn"]

LONGEST_ID = 80
"""The largest number of UTF-8 bytes of a session id: percent-encoded it is still the name of a file."""

_MOST_TURNS = 2**31
_WHERE = 'send it as extra_body={"vllm_xargs": {"session_id": "call-42", "turn": 0}}'


class SessionTurn(NamedTuple):
    """The dialogue of a request, and which of its utterances this is.

    Attributes:
        session_id: A non-empty string.
        turn: How many utterances were written before this one, from 0; None to write it in any case.
    """

    session_id: str
    turn: int | None = None


def session_turn(params: Any) -> SessionTurn | None:
    """The dialogue of a request; None if it has no `session_id`.

    Args:
        params: vLLM's SamplingParams.

    Raises:
        SessionError: The session id or the turn is not valid, or the request asks for several answers, each of which
            would write the utterance.

    Example:
        >>> from types import SimpleNamespace
        >>> session_turn(SimpleNamespace(extra_args={"session_id": "call-42", "turn": 3}, n=1))
        SessionTurn(session_id='call-42', turn=3)
        >>> session_turn(SimpleNamespace(extra_args={"session_id": "call-42"}, n=2))
        Traceback (most recent call last):
        ...
        mal_adapter.errors.SessionError: n=2 in session 'call-42': each answer would write the utterance; send n=1
    """
    extra = getattr(params, "extra_args", None) or {}
    session_id, turn = extra.get("session_id"), extra.get("turn")
    if session_id is None:
        if turn is not None:
            raise SessionError(f"turn={_shown(turn)} without a session_id; {_WHERE}")
        return None
    session_id = check_id(session_id)
    if turn is not None and (isinstance(turn, bool) or not isinstance(turn, int) or not 0 <= turn < _MOST_TURNS):
        raise SessionError(
            f"turn={_shown(turn)} is not a number of utterances: 0 for the first of a dialogue, then 1, 2 …"
        )
    answers = getattr(params, "n", 1)
    if answers != 1:
        raise SessionError(f"n={answers} in session {session_id!r}: each answer would write the utterance; send n=1")
    return SessionTurn(session_id, turn)


def check_id(session_id: object) -> str:
    """Return a session id that every store takes.

    Raises:
        SessionError: It is not a string, is empty, too long or not printable.
    """
    if not isinstance(session_id, str):
        raise SessionError(f"session_id={_shown(session_id)} is not a string; {_WHERE}")
    encoded = encode_session_id(session_id)  # raises if it is empty, or not Unicode
    if len(encoded) > LONGEST_ID or not session_id.isprintable():
        raise SessionError(
            f"session_id={_shown(session_id)} has {len(encoded)} bytes; use up to {LONGEST_ID}, printable, or a hash"
        )
    return session_id


def _shown(value: object) -> str:
    """The start of a value that a client sent; it may be megabytes long."""
    return f"{value!r:.60}"
