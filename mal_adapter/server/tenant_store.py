"""`TenantStore`: sessions in this process, where one tenant's sessions never evict those of another."""

import itertools
from collections.abc import Callable, Iterable, Iterator

from mal_adapter.errors import SessionError
from mal_adapter.memory.state import MemoryState
from mal_adapter.stores.base import Stored
from mal_adapter.stores.in_memory import InMemoryStore

__all__ = ["TenantStore"]


class TenantStore:
    """A store per tenant. The ids are those of `Space.stored`.

    Args:
        tenants: The names of all tenants.
        make: Makes the store of one tenant.
    """

    def __init__(self, tenants: Iterable[str], make: Callable[[], InMemoryStore] = InMemoryStore) -> None:
        self._stores = {tenant: make() for tenant in tenants}

    def get(self, session_id: str) -> Stored | None:
        """As `InMemoryStore.get`."""
        return self._of(session_id).get(session_id)

    def put(self, session_id: str, state: MemoryState, version: str | None = None) -> str:
        """As `InMemoryStore.put`; evicts sessions of the same tenant only."""
        return self._of(session_id).put(session_id, state, version)

    def drop(self, session_id: str) -> bool:
        """As `InMemoryStore.drop`."""
        return self._of(session_id).drop(session_id)

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self._stores.values())

    def __len__(self) -> int:
        return sum(map(len, self._stores.values()))

    def _of(self, session_id: str) -> InMemoryStore:
        tenant, _, _ = session_id.partition("/")
        if tenant not in self._stores:
            raise SessionError(f"session id {session_id!r} does not begin with a tenant's name")
        return self._stores[tenant]
