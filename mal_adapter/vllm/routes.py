"""Routes of vLLM's API server to look into sessions, and to move them: an endpoint plugin.

vLLM loads it where VLLM_PLUGINS names it: `VLLM_PLUGINS=mal_adapter vllm serve …`. The paths are under /v1, so that
`--api-key` protects them.

    GET    /v1/sessions                 ids
    GET    /v1/sessions/{id}            utterances, tokens, next_turn, what became of the last request
    DELETE /v1/sessions/{id}
    POST   /v1/sessions/{id}/fork?to=   a copy under another id
    GET    /v1/sessions/{id}/state      the state as a safetensors file, for MemoryState.load
    PUT    /v1/sessions/{id}/state
    GET    /v1/sessions-stats           counters

A slash in an id is sent as %2F, or as it is.
"""

import asyncio
from typing import Any

from mal_adapter.extras import explain_missing
from mal_adapter.vllm.metrics import MemoryMetrics

__all__ = ["SessionRoutes"]

_MOST_BYTES = 2**28  # of an upload; a state of the widest adapters has some megabytes


class SessionRoutes:
    """The endpoint plugin."""

    name = "mal_adapter"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add the routes to vLLM's app."""
        with explain_missing("SessionRoutes", extra="vllm"):
            from fastapi import APIRouter, HTTPException, Query, Request, Response

        router = APIRouter(tags=["sessions"])

        async def ask(request: Request, name: str, *args: Any) -> Any:
            status, value = await _ask(request.app.state.mal_adapter_engine, name, *args)
            if status != 200:
                raise HTTPException(status, value)
            return value

        @router.get("/v1/sessions-stats")
        async def stats(request: Request) -> Any:
            return await ask(request, "stats")

        @router.get("/v1/sessions")
        async def list_sessions(request: Request, limit: int = Query(1000, ge=0, le=100_000)) -> Any:
            return await ask(request, "list", limit)

        @router.post("/v1/sessions/{session_id:path}/fork")
        async def fork(request: Request, session_id: str, to: str) -> Any:
            return await ask(request, "fork", session_id, to)

        @router.get("/v1/sessions/{session_id:path}/state")
        async def download(request: Request, session_id: str) -> Response:
            return Response(await ask(request, "download", session_id), media_type="application/octet-stream")

        @router.put("/v1/sessions/{session_id:path}/state")
        async def upload(request: Request, session_id: str) -> Any:
            body = bytearray()
            async for part in request.stream():
                body += part
                if len(body) > _MOST_BYTES:
                    raise HTTPException(413, f"a state has at most {_MOST_BYTES} bytes")
            return await ask(request, "upload", session_id, bytes(body))

        @router.get("/v1/sessions/{session_id:path}")
        async def look(request: Request, session_id: str) -> Any:
            return await ask(request, "look", session_id)

        @router.delete("/v1/sessions/{session_id:path}")
        async def drop(request: Request, session_id: str) -> Any:
            return await ask(request, "drop", session_id)

        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep the engine for the routes, and begin to show its counters on `/metrics`."""
        state.mal_adapter_engine = engine_client
        if engine_client is None:
            return
        metrics = MemoryMetrics()
        metrics.register()
        # The app's state keeps the task: a task that nothing refers to may be collected.
        state.mal_adapter_metrics = asyncio.create_task(metrics.keep_up(lambda: _ask(engine_client, "stats")))


async def _ask(engine_client: Any, name: str, *args: Any) -> tuple[int, Any]:
    """What rank 0 of the engine answers; the other ranks hold no sessions."""
    if engine_client is None:
        return 503, "this server has no engine"
    answers = await engine_client.collective_rpc("mal_adapter", args=(name, *args))
    status, value = answers[0]
    return int(status), value
