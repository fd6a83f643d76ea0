"""How a WebSocket brings its API key: in a header, as a subprotocol, or in its first message."""

import asyncio
import json
from urllib.parse import urlsplit

from starlette.websockets import WebSocket

from mal_adapter.server.refusals import Refusal
from mal_adapter.server.service import Service
from mal_adapter.server.spaces import Space

__all__ = ["FIRST_S", "SUBPROTOCOL", "space_before", "space_by_message"]

#: What the server speaks. A browser names it together with `bearer.KEY`, since it can't send headers.
SUBPROTOCOL = "mal-adapter"
_KEY = "bearer."
#: Seconds within which the first message must come.
FIRST_S = 10.0


def space_before(service: Service, socket: WebSocket) -> Space | None:
    """The sessions that a WebSocket may use; None if its first message has to say.

    Raises:
        Refusal: 401 or 403; also 403 for a page of another site, which a browser lets open WebSockets to any server,
            unless keys protect this one.
    """
    origin = socket.headers.get("origin")
    if service.keys is None and origin is not None and urlsplit(origin).netloc != socket.headers.get("host"):
        detail = "a page of another site may not use a server without API keys; start it with --api-keys"
        raise Refusal(403, "other_origin", detail)
    offered = [name for name in socket.scope.get("subprotocols", ()) if name.startswith(_KEY)]
    if service.keys is None or "authorization" in socket.headers:
        return service.space(socket)
    if offered:
        return service.space(socket, f"Bearer {offered[0].removeprefix(_KEY)}")
    return None


async def space_by_message(service: Service, socket: WebSocket) -> Space:
    """The sessions that a WebSocket may use, by its first message: `{"type": "authorize", "api_key": KEY}`.

    Raises:
        Refusal: 401 or 403.
    """
    try:
        message = await asyncio.wait_for(socket.receive(), FIRST_S)
        fields = json.loads(message.get("text") or "")
        key = fields["api_key"] if fields["type"] == "authorize" else None
    except (asyncio.TimeoutError, ValueError, KeyError, TypeError, RecursionError):
        key = None
    if not isinstance(key, str):
        advice = 'send the header `Authorization: Bearer KEY`, or {"type": "authorize", "api_key": KEY} at first'
        raise Refusal(401, "missing_api_key", f"this server needs an API key; {advice}")
    return service.space(socket, f"Bearer {key}")
