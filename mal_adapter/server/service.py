"""`Service`: what the routes of one server share."""

from dataclasses import dataclass
from pathlib import Path

from starlette.requests import HTTPConnection

from mal_adapter.attach import AttachedMemory
from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer
from mal_adapter.server.answers import Answer, Turn
from mal_adapter.server.batcher import Batcher
from mal_adapter.server.drain import Drain
from mal_adapter.server.keys import ApiKeys
from mal_adapter.server.limits import Limits
from mal_adapter.server.metrics import Metrics
from mal_adapter.server.requests import note
from mal_adapter.server.spaces import Space
from mal_adapter.server.streams import Streams
from mal_adapter.server.turns import Turns

__all__ = ["Service"]


@dataclass(frozen=True)
class Service:
    """One model, its sessions, and who may use them; `folder` has the sound files that are processed now."""

    recognizer: EmotionRecognizer
    memory: AttachedMemory
    limits: Limits
    keys: ApiKeys | None
    turns: Turns
    batcher: Batcher[Turn, Answer]
    metrics: Metrics
    drain: Drain
    folder: Path
    streams: Streams

    def space(self, request: HTTPConnection, authorization: str | None = None) -> Space:
        """The sessions that a request may use.

        Args:
            request: An HTTP request or a WebSocket.
            authorization: `Bearer KEY`; the request's header unless given.

        Raises:
            Refusal: 401 or 403.
        """
        if self.keys is None:
            return Space(None)
        space = self.keys.space(request.headers.get("authorization") if authorization is None else authorization)
        note(request.scope, tenant=space.tenant)
        return space
