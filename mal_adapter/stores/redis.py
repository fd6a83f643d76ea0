"""`RedisStore`: sessions in Redis, for replicas on many machines."""

import hashlib
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from mal_adapter.errors import ConfigError, CopyError, SessionConflictError, StateFormatError
from mal_adapter.memory.state import MemoryState
from mal_adapter.stores.base import Stored, check_ttl, id_bytes
from mal_adapter.stores.redis_client import check_client, connect
from mal_adapter.stores.redis_errors import explained, where

if TYPE_CHECKING:
    from redis import Redis
    from redis.cluster import RedisCluster

__all__ = ["RedisStore"]

# A script is one round trip, and nothing else runs in Redis meanwhile. The last argument is "again" where a client
# sends it once more, since the answer was lost: then what is kept already is what the first sending put.
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
    """Keeps each session's state, as the bytes of a state file, at the key `prefix` + id.

    Any number of processes and threads may share it. Nothing is sent before the first access, and a Redis that was away
    is found again. If the connection breaks during a `put`, it may have been kept or not: `get` tells.

    A URL is `redis://[user][:password]@host[:port][/db]`, with `rediss://` for TLS or `unix://[:password]@/path.sock`;
    options follow as `?ssl_ca_certs=ca.pem&socket_timeout=1`. Percent-encode `/`, `#`, `?` and `@` in a password. It is
    shown nowhere.

    A client of your own is a `redis.Redis`, also of a pool, of one connection or from a Sentinel's `master_for`, or a
    `redis.RedisCluster`. It must answer at once, in bytes, and from primaries. It may retry.

    A store can be pickled if it was made of a URL without a user, a password and options.

    Args:
        url: Where Redis is, or a client of it.
        prefix: What keys begin with. Stores whose prefixes don't begin with one another share a Redis unseen.
        ttl_s: Seconds after its last put at which a session expires; None for never.

    Raises:
        ConfigError: The URL can't be understood, the client is of another kind, or `ttl_s` is not positive.
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
        ttl_ms = b"" if self.ttl_s is None else b"%d" % math.ceil(self.ttl_s * 1000)
        with explained("write", self._client):
            kept = self._compare_and_set(key, data, (version or "").encode(), ttl_ms)
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

    def __reduce__(self) -> tuple[type["RedisStore"], tuple[str, str, float | None]]:
        if self._url is None:
            raise CopyError("a RedisStore of a client has connections of this process; make a store in the other one")
        if any(sign in self._url for sign in "@?"):
            raise CopyError(
                "this RedisStore's URL may hold a password, and what is pickled may be kept or sent; hand the other "
                "process the URL in your own way, and make a RedisStore there"
            )
        return RedisStore, (self._url, self.prefix, self.ttl_s)

    def _compare_and_set(self, key: bytes, *values: bytes) -> bool:
        from redis.exceptions import NoScriptError, ReadOnlyError

        client = self._client
        try:
            try:
                return bool(client.evalsha(_SHA, 1, key, *values, _Sending()))
            except NoScriptError:  # a new server, or a node of a cluster that has just become a primary
                return bool(client.eval(_COMPARE_AND_SET, 1, key, *values, _Sending()))  # type: ignore[arg-type]
        except ReadOnlyError:
            # The primary of a failover keeps old connections open; new ones go where its name leads to now.
            if (pool := getattr(client, "connection_pool", None)) is not None:
                pool.disconnect(inuse_connections=False)
            raise

    def _key(self, session_id: str) -> bytes:
        return self.prefix.encode() + id_bytes(session_id)


class _Sending(str):
    """An argument of a command: empty, and "again" when a client that retries sends the command once more.

    A client encodes the arguments at each sending. One that looks into a str by itself, as hiredis does, sends it empty
    each time: a put whose answer was lost is then a conflict with itself.
    """

    _sent = False

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        value, self._sent = b"again" if self._sent else b"", True
        return value


def _version(data: bytes) -> str:
    """Of the content alone, as the script computes it; each utterance changes its counters."""
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
