"""The sessions that one API key may use: a space of ids of its own."""

from typing import NamedTuple

from mal_adapter.errors import SessionError
from mal_adapter.stores.base import encode_session_id

__all__ = ["Space"]


class Space(NamedTuple):
    """The sessions of one tenant, or of everybody where the server has no API keys.

    A session of a tenant has the store's id `tenant/id`. A tenant's name has no slash, so the first slash of such an id
    ends the name, and two tenants never share an id, whatever characters their ids have.

    Attributes:
        tenant: The tenant's name; None for everybody.

    Example:
        >>> Space("acme").stored("../globex/call-1")
        'acme/../globex/call-1'
        >>> Space("globex").own("acme/../globex/call-1") is None
        True
    """

    tenant: str | None

    def stored(self, session_id: str) -> str:
        """The id of a session in the store.

        Raises:
            SessionError: The id is empty, is not Unicode, or has a null character.
        """
        encode_session_id(session_id)
        # All bytes that are not UTF-8 are decoded to U+FFFD: different ids would become one session.
        if "\ufffd" in session_id or "\0" in session_id:
            raise SessionError(f"session id {session_id!r} is not UTF-8, or has a null character")
        return session_id if self.tenant is None else f"{self.tenant}/{session_id}"

    def own(self, stored_id: str) -> str | None:
        """The inverse of `stored`; None for a session of another space."""
        if self.tenant is None:
            return stored_id
        tenant, slash, session_id = stored_id.partition("/")
        return session_id if tenant == self.tenant and slash and session_id else None
