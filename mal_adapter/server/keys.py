"""API keys: who may use the server, and whose sessions a request sees."""

import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from mal_adapter.errors import ConfigError
from mal_adapter.server.refusals import Refusal
from mal_adapter.server.spaces import Space

__all__ = ["ApiKeys"]

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
SHORTEST = 20  # characters: a key is made by a machine, so that one round of SHA-256 is enough for its digest


class ApiKeys:
    """The keys of all tenants. Only digests are kept.

    Args:
        pairs: Tenant's name, and the SHA-256 digest of a key. A tenant may have several keys, for changing them.

    Raises:
        ConfigError: There are none, or two tenants have the same key.

    Example:
        >>> keys = ApiKeys([("acme", hashlib.sha256(b"a-key-made-by-a-machine").digest())])
        >>> keys.space("Bearer a-key-made-by-a-machine")
        Space(tenant='acme')
    """

    def __init__(self, pairs: Iterable[tuple[str, bytes]]) -> None:
        self._pairs = list(pairs)
        if not self._pairs:
            raise ConfigError(
                "there are no API keys, so nobody could use the server; give a line `NAME KEY` per tenant"
            )
        owners: dict[bytes, str] = {}
        for name, digest in self._pairs:
            if owners.setdefault(digest, name) != name:
                raise ConfigError(f"the tenants {owners[digest]} and {name} have the same API key; give each its own")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "ApiKeys":
        """Read a file with a line `NAME KEY` or `NAME sha256:DIGEST` per key; `#` begins a comment line.

        Raises:
            ConfigError: The file can't be read, or a line is not valid. The message has the line's number only, since
                the line may be a secret.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ConfigError(f"can't read the API keys in {os.fspath(path)}: {reason}") from error
        pairs = []
        for number, line in enumerate(lines, start=1):
            if line.strip() and not line.lstrip().startswith("#"):
                try:
                    pairs.append(_parse(line.split()))
                except ConfigError as error:
                    raise ConfigError(f"{os.fspath(path)}, line {number}: {error}") from None
        return cls(pairs)

    @property
    def tenants(self) -> Sequence[str]:
        """The names of all tenants."""
        return list(dict.fromkeys(name for name, _ in self._pairs))

    def space(self, authorization: str | None) -> Space:
        """The sessions of the owner of a key.

        Args:
            authorization: The header `Authorization: Bearer KEY`.

        Raises:
            Refusal: 401 without a key, 403 with an unknown one.
        """
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            advice = "send the header `Authorization: Bearer KEY`"
            raise Refusal(
                401, "missing_api_key", f"this server needs an API key; {advice}", {"WWW-Authenticate": "Bearer"}
            )
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        found = None
        for name, known in self._pairs:  # all of them, so that the time does not depend on the key
            if hmac.compare_digest(digest, known):
                found = name
        if found is None:
            raise Refusal(403, "unknown_api_key", "this API key is not known here; ask the operator for one")
        return Space(found)


def _parse(words: list[str]) -> tuple[str, bytes]:
    if len(words) != 2:
        raise ConfigError(f"expected a name and a key, got {len(words)} words")
    name, key = words
    if not _NAME.fullmatch(name):
        raise ConfigError("the name must have up to 32 of a-z, 0-9, - _ and ., the first a letter or digit")
    if key.startswith("sha256:"):
        if not _DIGEST.fullmatch(key):
            raise ConfigError("the digest must be sha256: and 64 of 0-9 and a-f")
        return name, bytes.fromhex(key.removeprefix("sha256:"))
    if len(key) < SHORTEST or not key.isascii():
        raise ConfigError(
            f"the key must have at least {SHORTEST} ASCII characters: "
            "python -c 'import secrets; print(secrets.token_urlsafe(32))' makes one"
        )
    return name, hashlib.sha256(key.encode()).digest()
