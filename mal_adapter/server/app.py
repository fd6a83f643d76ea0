"""`make_app`: the server as an ASGI application."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mal_adapter.attach import AttachedMemory
from mal_adapter.errors import MalAdapterError, SessionConflictError
from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer
from mal_adapter.server.answers import Answer, Answerer, Turn
from mal_adapter.server.batcher import Batcher
from mal_adapter.server.drain import Drain
from mal_adapter.server.flush import flush
from mal_adapter.server.keys import ApiKeys
from mal_adapter.server.limits import Limits
from mal_adapter.server.metrics import Metrics
from mal_adapter.server.probe_routes import probe_routes
from mal_adapter.server.refusals import Refusal, refusal_of
from mal_adapter.server.requests import Requests
from mal_adapter.server.service import Service
from mal_adapter.server.session_routes import session_routes
from mal_adapter.server.stream_routes import stream_routes
from mal_adapter.server.streams import Streams
from mal_adapter.server.turns import Turns
from mal_adapter.server.utterance_routes import utterance_routes

__all__ = ["make_app"]

log = logging.getLogger(__name__)


class _Text(PathConvertor):
    """Any text within a path: slashes, as in `path`, and the ends of lines too."""

    regex = "(?s:.*)"


register_url_convertor("text", _Text())


def make_app(
    recognizer: EmotionRecognizer, memory: AttachedMemory, limits: Limits | None = None, keys: ApiKeys | None = None
) -> FastAPI:
    """Routes to the sessions of one recogniser. A session changes only if its utterance is answered.

    Args:
        recognizer: With a memory.
        memory: The recogniser's. With keys and without a store for several processes, give `attach_memory` a
            `TenantStore`.
        limits: `Limits()` unless given.
        keys: Who may use the server; unless given, everybody who reaches it.

    Returns:
        The application. `app.state.drain` refuses new requests, `app.state.flushed` tells whether the shutdown has
        saved all states.
    """
    limits = Limits() if limits is None else limits
    turns, drain = Turns(limits), Drain()
    batcher: Batcher[Turn, Answer] = Batcher(Answerer(recognizer, memory), limits)
    streams = Streams(limits, drain)
    metrics = Metrics(memory.states, batcher.__len__, lambda: turns.pending, streams.__len__)
    batcher.taken = metrics.batch_size.observe
    folder = TemporaryDirectory(prefix="mal_adapter")  # deleted with the application
    service = Service(recognizer, memory, limits, keys, turns, batcher, metrics, drain, Path(folder.name), streams)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        streams.start()
        yield
        await streams.stop()
        await batcher.stop()
        app.state.flushed = await run_in_threadpool(flush, memory.states)
        folder.cleanup()

    # An id may end in a slash, so paths are not redirected to ones with or without it.
    public = None if keys is not None else "/openapi.json"  # with keys, strangers see no more than the probes
    app = FastAPI(title="Emotions of spoken dialogues", lifespan=lifespan, redirect_slashes=False, openapi_url=public)
    app.state.drain, app.state.flushed = drain, False
    app.state.max_message_bytes = limits.max_message_bytes
    for router in (
        utterance_routes(service), stream_routes(service), session_routes(service), probe_routes(service)
    ):  # fmt: skip
        app.include_router(router)
    app.add_middleware(Requests, metrics=metrics, drain=drain)

    @app.exception_handler(HTTPException)
    async def refuse(_: Request, error: HTTPException) -> JSONResponse:
        kind = error.kind if isinstance(error, Refusal) else _KINDS.get(error.status_code, "invalid_request")
        return JSONResponse({"type": kind, "detail": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_parameters(_: Request, error: RequestValidationError) -> JSONResponse:
        problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        return JSONResponse({"type": "invalid_request", "detail": problems}, 422)

    @app.exception_handler(MalAdapterError)
    async def explain(request: Request, error: MalAdapterError) -> JSONResponse:
        log.warning("%s: %s", type(error).__name__, error)
        if isinstance(error, SessionConflictError):
            metrics.conflicts.inc()
        return await refuse(request, refusal_of(error))

    @app.exception_handler(Exception)
    async def apologize(request: Request, error: Exception) -> JSONResponse:
        return await refuse(request, refusal_of(error))  # the ASGI server logs the traceback

    @app.exception_handler(ClientDisconnect)
    async def end(*_: object) -> JSONResponse:
        return JSONResponse(None, 400)  # nobody reads it

    return app


_KINDS = {404: "not_found", 405: "method_not_allowed"}
