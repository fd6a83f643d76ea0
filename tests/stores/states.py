"""States that differ in every number, and counting up in a store as several writers do."""

import torch

from mal_adapter import MemoryState
from mal_adapter.errors import SessionConflictError
from mal_adapter.stores import SessionStore


def state_of(utterances: int, width: int = 4, fingerprint: str | None = "adapter-1") -> MemoryState:
    """A state of two layers whose every number follows from `utterances`; a mixture of two is found."""
    generator = torch.Generator().manual_seed(utterances)
    shapes = [(1, 2, width, width + 1), (1, 2, width + 1, width)]
    weights, momentum = (tuple(torch.randn(s, generator=generator) for s in shapes) for _ in range(2))
    count = torch.tensor([utterances])
    return MemoryState(weights, momentum, count, count * 20, count // 7, fingerprint)


def count_up(store: SessionStore, session_id: str, times: int) -> int:
    """Add `times` utterances to a session, one by one, and again after a conflict. Returns the number of conflicts."""
    conflicts = 0
    while times:
        stored = store.get(session_id)
        reached, version = (0, None) if stored is None else (int(stored.state.utterances), stored.version)
        try:
            store.put(session_id, state_of(reached + 1), version)
            times -= 1
        except SessionConflictError:
            conflicts += 1
    return conflicts
