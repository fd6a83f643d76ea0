"""`RedisStore`: sessions in Redis, for replicas on many machines."""

import hashlib
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from mal_adapter.errors import ConfigError, SessionConflictError, StateFormatError
from mal_adapter.state import MemoryState
from mal_adapter.stores.base import Stored
from mal_adapter.stores.checks import check_ttl, id_bytes
from mal_adapter.stores.redis_client import connect, explained, where

if TYPE_CHECKING:
    from redis import Redis

__all__ = ["RedisStore"]

# A script is one round trip, and nothing else runs in Redis meanwhile.
_COMPARE_AND_SET = """
local kept = redis.call('GET', KEYS[1])
if kept and redis.sha1hex(kept) ~= ARGV[2] then return 0 end
if ARGV[3] == '' then
    redis.call('SET', KEYS[1], ARGV[1])
else
    redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
end
return 1
"""


class RedisStore:
    """Keeps each session's state, as the bytes of a state file, at the key `prefix` + id.

    Any number of processes and threads may share it. Nothing is sent before the first access, and a Redis that was away
    is found again. If the connection breaks during a `put`, it may have been kept or not: `get` tells.

    A URL is `redis://[user][:password]@host[:port][/db]`, with `rediss://` for TLS or `unix://[:password]@/path.sock`;
    options follow as `?ssl_ca_certs=ca.pem&socket_timeout=1`. Percent-encode `/`, `#`, `?` and `@` in a password. It is
    shown nowhere. A client of your own must not decode responses, and is better not to retry: a put whose answer was
    lost would conflict with itself.

    Args:
        url: Where Redis is, or a client of it.
        prefix: What keys begin with. Stores whose prefixes don't begin with one another share a Redis unseen.
        ttl_s: Seconds after its last put at which a session expires; None for never.

    Raises:
        ConfigError: The URL can't be understood, the client decodes, or `ttl_s` is not positive.
        StoreError: redis-py is not installed.
    """

    def __init__(self, url: "str | Redis", prefix: str = "mal_adapter:", ttl_s: float | None = None) -> None:
        check_ttl(ttl_s)
        self.prefix = prefix
        self.ttl_s = ttl_s
        self._client = connect(url) if isinstance(url, str) else url
        if self._client.get_encoder().decode_responses:
            raise ConfigError("this Redis client decodes responses, and states are bytes; set decode_responses=False")
        self._compare_and_set = self._client.register_script(_COMPARE_AND_SET)

    def get(self, session_id: str) -> Stored | None:
        """The state of a session, on the CPU, or None where there is none, or none any more.

        Raises:
            SessionError: `session_id` is not a non-empty string.
            StateFormatError: The value is damaged, or is no state; the message names its key.
            StoreError: Redis can't be reached, or refuses.
        """
        key = self._key(session_id)
        with explained("read", self._client):
            data = cast("bytes | None", self._client.get(key))
        if data is None:
            return None
        try:
            return Stored(MemoryState.from_bytes(data), _version(data))
        except StateFormatError as error:
            raise StateFormatError(f"{key!r} in {self!r}: {error}; drop this session") from error

    def put(self, session_id: str, state: MemoryState, version: str | None = None) -> str:
        """Keep `state`, all of it or, on an error, nothing; only if the connection breaks meanwhile, that is open.

        Arguments and result are those of `SessionStore.put`.

        Raises:
            SessionConflictError: Someone else has kept another state since; theirs stays.
            SessionError: `session_id` is not a non-empty string.
            StoreError: Redis can't be reached, is full, or refuses.
        """
        key = self._key(session_id)
        data = state.to_bytes()
        ttl_ms = "" if self.ttl_s is None else math.ceil(self.ttl_s * 1000)
        with explained("write", self._client):
            kept = self._compare_and_set(keys=[key], args=[data, version or "", ttl_ms])
        if not kept:
            raise SessionConflictError(
                f"session {session_id!r} has been kept in {self!r} by someone else; get it again"
            )
        return _version(data)

    def drop(self, session_id: str) -> bool:
        """Delete a session's key; whether there was one.

        Raises:
            SessionError: `session_id` is not a non-empty string.
            StoreError: Redis can't be reached, or refuses.
        """
        key = self._key(session_id)
        with explained("delete", self._client):
            return bool(self._client.delete(key))

    def __iter__(self) -> Iterator[str]:
        """The ids of all sessions, in no particular order; those that come or go meanwhile may be missing.

        Raises:
            StoreError: Redis can't be reached, or refuses.
        """
        prefix = self.prefix.encode()
        pattern = re.sub(rb"([*?\[\]\\])", rb"\\\1", prefix) + b"*"
        session_ids = set()  # SCAN may give a key twice
        with explained("list", self._client):
            for key in cast("Iterator[bytes]", self._client.scan_iter(match=pattern, count=1000)):
                try:
                    session_ids.add(key[len(prefix) :].decode())
                except UnicodeDecodeError:  # someone else's key
                    continue
        return iter(session_ids - {""})

    def __repr__(self) -> str:
        return f"RedisStore({where(self._client)!r}, prefix={self.prefix!r}, ttl_s={self.ttl_s})"

    def _key(self, session_id: str) -> bytes:
        return self.prefix.encode() + id_bytes(session_id)


def _version(data: bytes) -> str:
    """Of the content alone, as the script computes it; each utterance changes its counters."""
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
