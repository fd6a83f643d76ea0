"""`RedisStore`: sessions in Redis, for replicas on many machines."""

import hashlib
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from mal_adapter.errors import ConfigError, CopyError, SessionConflictError, StateFormatError
from mal_adapter.memory.state import MemoryState
from mal_adapter.stores.base import Stored, check_ttl, encode_session_id
from mal_adapter.stores.redis_client import check_client, connect
from mal_adapter.stores.redis_errors import explained, where

if TYPE_CHECKING:
    from redis import Redis
    from redis.cluster import RedisCluster

__all__ = ["RedisStore"]

# A script is one round trip, and Redis runs nothing else meanwhile. The last argument is "again" when a client sends
# the command again since the answer was lost: then the first sending may have saved the state already.
_COMPARE_AND_SET = b"""
local kept = redis.call('GET', KEYS[1])
if kept and ARGV[4] == 'again' and kept == ARGV[1] then return 1 end
if kept and redis.sha1hex(kept) ~= ARGV[2] then return 0 end
if ARGV[3] == '' then
    redis.call('SET', KEYS[1], ARGV[1])
else
    redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
end
return 1
"""
_SHA = hashlib.sha1(_COMPARE_AND_SET, usedforsecurity=False).hexdigest()


class RedisStore:
    """Sessions in Redis: the bytes of a state file at the key `prefix` + id.

    Any number of processes and threads may share it. It connects at the first access, and again after an outage. If the
    connection breaks during a `put`, the state may have been saved or not: call `get`.

    A URL is `redis://[user][:password]@host[:port][/db]`, with `rediss://` for TLS or `unix://[:password]@/path.sock`;
    options follow as `?ssl_ca_certs=ca.pem&socket_timeout=1`. Percent-encode `/`, `#`, `?` and `@` in a password. No
    message shows it.

    A client is a `redis.Redis`, including one with a pool, one connection or from a Sentinel's `master_for`, or a
    `redis.RedisCluster`. It must be synchronous, return bytes and read from primaries. It may retry.

    A store can be pickled if it was made from a URL without user, password and options.

    Args:
        url: A Redis URL, or a client.
        prefix: Of all keys. Several stores may use one Redis if no prefix begins with another one.
        ttl_s: A session expires this many seconds after its last put; None means never.

    Raises:
        ConfigError: The URL or the client is not valid, or `ttl_s` is not positive.
        MissingDependencyError: redis-py is not installed.
    """

    def __init__(
        self, url: "str | Redis | RedisCluster", prefix: str = "mal_adapter:", ttl_s: float | None = None
    ) -> None:
        check_ttl(ttl_s)
        self.prefix = _check_prefix(prefix)
        self.ttl_s = ttl_s
        self._client: Redis | RedisCluster = check_client(connect(url) if isinstance(url, str) else url)
        self._url = url if isinstance(url, str) else None

    def get(self, session_id: str) -> Stored | None:
        """The state of a session, on the CPU, or None if it does not exist or has expired.

        Raises:
            SessionError: `session_id` is not a non-empty string.
            StateFormatError: The value is damaged, or is not a state; the message names its key.
            StoreError: Redis can't be reached, or returns an error.
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
        """Save `state` completely or, on an error, not at all. If the connection breaks, it may be either.

        Arguments and result are those of `SessionStore.put`.

        Raises:
            SessionConflictError: Another writer has saved another state since; its state stays.
            SessionError: `session_id` is not a non-empty string.
            StoreError: Redis can't be reached, is full, or returns an error.
        """
        key = self._key(session_id)
        data = state.to_bytes()
        ttl_ms = b"" if self.ttl_s is None else b"%d" % math.ceil(self.ttl_s * 1000)
        with explained("write", self._client):
            kept = self._compare_and_set(key, data, (version or "").encode(), ttl_ms)
        if not kept:
            raise SessionConflictError(f"another writer has saved session {session_id!r} in {self!r}; get it again")
        return _version(data)

    def drop(self, session_id: str) -> bool:
        """Delete a session's key. Returns whether it existed.

        Raises:
            SessionError: `session_id` is not a non-empty string.
            StoreError: Redis can't be reached, or returns an error.
        """
        key = self._key(session_id)
        with explained("delete", self._client):
            return bool(self._client.delete(key))

    def __iter__(self) -> Iterator[str]:
        """The ids of all sessions, in no particular order; those created or deleted meanwhile may be missing.

        Raises:
            StoreError: Redis can't be reached, or returns an error.
        """
        prefix = self.prefix.encode()
        pattern = re.sub(rb"([*?\[\]\\])", rb"\\\1", prefix) + b"*"
        session_ids = set()  # SCAN may return a key twice
        with explained("list", self._client):
            for key in cast("Iterator[bytes]", self._client.scan_iter(match=pattern, count=1000)):
                try:
                    session_ids.add(key[len(prefix) :].decode())
                except UnicodeDecodeError:  # a key of another application
                    continue
        return iter(session_ids - {""})

    def __repr__(self) -> str:
        return f"RedisStore({where(self._client)!r}, prefix={self.prefix!r}, ttl_s={self.ttl_s})"

    def __reduce__(self) -> tuple[type["RedisStore"], tuple[str, str, float | None]]:
        if self._url is None:
            raise CopyError(
                "a RedisStore made from a client has connections of this process; make a store in the other process"
            )
        if any(sign in self._url for sign in "@?"):
            raise CopyError(
                "this RedisStore's URL may have a password, and pickled data may be sent or stored; pass the URL to "
                "the other process in your own way, and make a RedisStore there"
            )
        return RedisStore, (self._url, self.prefix, self.ttl_s)

    def _compare_and_set(self, key: bytes, *values: bytes) -> bool:
        from redis.exceptions import NoScriptError, ReadOnlyError

        client = self._client
        try:
            try:
                return bool(client.evalsha(_SHA, 1, key, *values, _Sending()))
            except NoScriptError:  # a new server, or a node that has just become a primary
                return bool(client.eval(_COMPARE_AND_SET, 1, key, *values, _Sending()))  # type: ignore[arg-type]
        except ReadOnlyError:
            # After a failover, old connections are still to the former primary; new ones are to the current one.
            if (pool := getattr(client, "connection_pool", None)) is not None:
                pool.disconnect(inuse_connections=False)
            raise

    def _key(self, session_id: str) -> bytes:
        return self.prefix.encode() + encode_session_id(session_id)


class _Sending(str):
    """An argument of a command: empty, and "again" when a client that retries sends the command once more.

    A client encodes the arguments at each sending. hiredis reads a str without `encode` and sends it empty each time:
    then a put whose answer was lost conflicts with itself.
    """

    _sent = False

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        value, self._sent = b"again" if self._sent else b"", True
        return value


def _version(data: bytes) -> str:
    """A hash of the content, as the script computes it. Each utterance changes the counters in it."""
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def _check_prefix(prefix: str) -> str:
    given: object = prefix
    if not isinstance(given, str):
        raise ConfigError(f"prefix={given!r} is not a string")
    try:
        prefix.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"prefix={prefix!r} is not valid Unicode: {error}") from error
    return prefix
