"""The routes for whatever watches the server. They need no API key."""

from typing import Any

from fastapi import APIRouter, Response

from mal_adapter.server.metrics import CONTENT_TYPE
from mal_adapter.server.refusals import AGAIN, Refusal
from mal_adapter.server.service import Service
from mal_adapter.server.spaces import Space

__all__ = ["probe_routes"]


def probe_routes(service: Service) -> APIRouter:
    """`/health`, `/ready` and `/metrics`."""
    router, states = APIRouter(), service.memory.states
    any_id = Space(None if service.keys is None else service.keys.tenants[0]).stored("?")

    @router.get("/health")
    async def health() -> dict[str, Any]:
        outage = states.outage
        waits = None if outage is None else {"since_s": round(outage.for_s), "next_try_s": round(outage.next_try_s, 1)}
        counts = {"pending": service.turns.pending, "unsaved": 0 if outage is None else outage.sessions}
        status = "draining" if service.drain.began else "alive"
        return {"status": status, **counts, "outage": waits, "lost": states.backlog.lost}

    @router.get("/ready")
    def ready() -> dict[str, str]:
        states.store.get(any_id)  # raises where the store can't be reached
        if states.backlog.full():
            detail = "the store can't save sessions, and this process has no room for more"
            raise Refusal(503, "store_unavailable", detail, AGAIN)
        return {"status": "ready"}

    @router.get("/metrics", response_class=Response)
    def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    return router
