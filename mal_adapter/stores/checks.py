"""What every store checks in its arguments."""

import math

from mal_adapter.errors import ConfigError, SessionError

__all__ = ["check_count", "check_ttl", "id_bytes"]


def check_count(name: str, value: int | None) -> None:
    """Raise `ConfigError` unless `value` is a positive integer, or None for no limit."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"{name}={value!r} is neither a positive integer nor None, which sets no limit")


def check_ttl(ttl_s: float | None) -> None:
    """Raise `ConfigError` unless `ttl_s` is a positive number of seconds, or None for ever."""
    if ttl_s is None:
        return
    number = isinstance(ttl_s, (int, float)) and not isinstance(ttl_s, bool)
    if not number or not math.isfinite(ttl_s) or ttl_s <= 0:
        raise ConfigError(f"ttl_s={ttl_s!r} is neither a positive number of seconds nor None, which keeps for ever")


def id_bytes(session_id: object) -> bytes:
    """A session id as UTF-8, the form in which it leaves the process.

    Raises:
        SessionError: It is not a non-empty string, or holds a lone surrogate, which is no character.
    """
    if not isinstance(session_id, str) or not session_id:
        raise SessionError(f"session id {session_id!r} is not a non-empty string; str() makes one of a number")
    try:
        return session_id.encode()
    except UnicodeEncodeError as error:
        raise SessionError(f"session id {session_id!r} is not valid Unicode: {error}") from error
