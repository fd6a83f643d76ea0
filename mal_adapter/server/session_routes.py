"""The routes that list, show, fork, download, upload and delete sessions."""

import heapq
import json
from contextlib import AsyncExitStack
from typing import Annotated, Any

import torch
from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from mal_adapter.errors import SessionConflictError, StateFormatError, StateMismatchError
from mal_adapter.memory.state import MemoryState
from mal_adapter.server.bodies import read
from mal_adapter.server.refusals import Refusal, no_session
from mal_adapter.server.requests import note
from mal_adapter.server.service import Service
from mal_adapter.server.turns import in_time

__all__ = ["session_routes"]


def session_routes(service: Service) -> APIRouter:
    """`/sessions`, `/sessions/ID`, `/sessions/ID/fork` and `/states/ID`."""
    router, states, limits = APIRouter(), service.memory.states, service.limits

    def name(request: Request, session_id: str) -> str:
        note(request.scope, session=session_id)
        return service.space(request).stored(session_id)

    def find(stored_id: str) -> MemoryState:
        if (state := states.get(stored_id)) is None:
            raise no_session()
        return state

    def create(stored_id: str, state: MemoryState) -> None:
        """Save a state as a new session."""
        exists = Refusal(409, "session_exists", "a session with this id exists; delete it first, or choose another id")
        if states.get(stored_id) is not None:  # perhaps not in the store, but unsaved in this process
            raise exists
        try:
            states.store.put(stored_id, state.detach())
        except SessionConflictError:  # another replica has made it meanwhile
            raise exists from None

    def describe(session_id: str, stored_id: str, state: MemoryState) -> dict[str, Any]:
        counters = {name: int(getattr(state, name)) for name in ("utterances", "tokens", "skipped_writes")}
        return {"session": session_id, **counters, "saved": stored_id not in states.backlog}

    @router.get("/sessions")
    def list_sessions(
        request: Request, limit: Annotated[int, Query(ge=1, le=1000)] = 100, after: str = ""
    ) -> dict[str, Any]:
        """A page of ids, sorted; `next` is the `after` of the next page."""
        space = service.space(request)
        own = (session_id for stored_id in states if (session_id := space.own(stored_id)) is not None)
        page = heapq.nsmallest(limit + 1, (session_id for session_id in own if session_id > after))
        return {"sessions": page[:limit], "next": page[limit - 1] if len(page) > limit else None}

    @router.get("/sessions/{session_id:text}")
    def get_session(session_id: str, request: Request) -> dict[str, Any]:
        stored_id = name(request, session_id)
        return describe(session_id, stored_id, find(stored_id))

    @router.delete("/sessions/{session_id:text}", status_code=204)
    async def delete_session(session_id: str, request: Request) -> None:
        stored_id = name(request, session_id)
        async with AsyncExitStack() as held:
            with in_time(limits.timeout_s):
                await held.enter_async_context(service.turns.of(stored_id))
            try:
                await run_in_threadpool(states.__delitem__, stored_id)
            except KeyError:
                raise no_session() from None

    @router.post("/sessions/{session_id:text}/fork", status_code=201)
    async def fork_session(session_id: str, request: Request) -> dict[str, Any]:
        """The body is `{"to": ID}`, the id of the new session, which continues from this one."""
        source = name(request, session_id)
        async with AsyncExitStack() as held:
            with in_time(limits.timeout_s):
                held.enter_context(service.turns.counted())
                to = _target(await read(request, limits.max_bytes))
                target = service.space(request).stored(to)
                await held.enter_async_context(service.turns.locked(source, target))

            def fork() -> dict[str, Any]:
                state = find(source)
                create(target, state)
                return describe(to, target, state)

            return await run_in_threadpool(fork)

    @router.get("/states/{session_id:text}", response_class=Response)
    def download_state(session_id: str, request: Request) -> Response:
        """The session's state, as a safetensors file."""
        return Response(find(name(request, session_id)).to_bytes(), media_type="application/octet-stream")

    @router.put("/states/{session_id:text}", status_code=201)
    async def upload_state(session_id: str, request: Request) -> dict[str, Any]:
        """The body is a state's safetensors file; a new session continues from it."""
        stored_id = name(request, session_id)
        async with AsyncExitStack() as held:
            with in_time(limits.timeout_s):
                await held.enter_async_context(service.turns.of(stored_id))
                body = await read(request, limits.max_bytes)
            note(request.scope, bytes=len(body))

            def upload() -> dict[str, Any]:
                state = _parse_state(service, body)
                create(stored_id, state)
                return describe(session_id, stored_id, state)

            return await run_in_threadpool(upload)

    return router


def _target(body: bytes) -> str:
    try:
        to = json.loads(body)["to"]
    except (ValueError, TypeError, KeyError, RecursionError):
        to = None
    if not isinstance(to, str):
        raise Refusal(422, "invalid_request", 'send a JSON object {"to": ID} with the id of the new session')
    return to


def _parse_state(service: Service, body: bytes) -> MemoryState:
    try:
        state = MemoryState.from_bytes(body)
        service.memory.adapter.check_state(state)
    except StateFormatError:
        detail = f"these {len(body)} bytes are not a state's safetensors file; send what GET /states/ID answers"
        raise Refusal(422, "bad_state", detail) from None
    except StateMismatchError:
        raise Refusal(422, "bad_state", "this state was written by another adapter than this server's") from None
    if state.batch_size != 1:
        raise Refusal(422, "bad_state", f"this file has the states of {state.batch_size} dialogues; send one")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in state.tensors.values()):
        raise Refusal(422, "bad_state", "this state has values that are not finite numbers")
    return state
