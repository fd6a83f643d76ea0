"""What happens around every request: a count, a line in the log, and the refusal of new requests during a drain."""

import logging
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mal_adapter.server.drain import Drain
from mal_adapter.server.metrics import Metrics

__all__ = ["Requests", "note"]

log = logging.getLogger(__name__)

_PROBES = ("/health", "/metrics")  # answered during a drain, too
_DETAIL = "this server is shutting down; send it again, another replica or the next process answers"


class Requests:
    """Middleware around the whole application.

    Args:
        app: The application.
        metrics: Counts the requests.
        drain: Counts the running ones.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, drain: Drain) -> None:
        self._app = app
        self._metrics = metrics
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        started = time.perf_counter()
        fields = scope["mal_adapter"] = {}
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "websocket.accept":
                status = 101
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
                if self._drain.began:  # or the client would send its next request to this process
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        with self._drain.request():
            try:
                if self._drain.began and scope["path"] not in _PROBES:
                    if scope["type"] == "websocket" and "websocket.http.response" not in scope.get("extensions", {}):
                        return await send({"type": "websocket.close", "code": 1012, "reason": "draining"})
                    body = {"type": "draining", "detail": _DETAIL}
                    await JSONResponse(body, 503, {"Retry-After": "1"})(scope, receive, sending)
                else:
                    await self._app(scope, receive, sending)
            except Exception:
                status = status or 500
                raise
            finally:
                self._record(scope, status, time.perf_counter() - started, fields)

    def _record(self, scope: Scope, status: int, elapsed_s: float, fields: MutableMapping[str, Any]) -> None:
        # The template, since a path may have any text; and one name for all unknown methods and paths.
        route = getattr(scope.get("route"), "path", "other").replace(":text", "")
        method = scope.get("method", "WEBSOCKET")
        method = method if method in _METHODS else "other"
        self._metrics.answered(method, route, status, elapsed_s)
        line = {"method": method, "route": route, "status": status, "elapsed_ms": round(elapsed_s * 1000, 1)}
        log.info("request", extra={"fields": {**line, **fields}})


_METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "WEBSOCKET")


def note(scope: Scope, **fields: Any) -> None:
    """Add fields to a request's line in the log. Never add audio or keys."""
    scope.get("mal_adapter", {}).update(fields)
