"""A client of live streams, for tests: what a program does with the library websockets."""

import contextlib
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

FINISH = json.dumps({"type": "finish"})


class Received(NamedTuple):
    """Everything that the server said, and how it closed the connection."""

    messages: list[dict[str, Any]]
    code: int | None

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["type"] == kind]

    @property
    def turns(self) -> list[dict[str, Any]]:
        return self.of("turn")

    @property
    def end(self) -> dict[str, Any]:
        assert self.messages[-1]["type"] == "end"
        return self.messages[-1]


def dial(port: int, path: str, **options: Any) -> ClientConnection:
    return connect(f"ws://127.0.0.1:{port}{path}", compression=None, open_timeout=60, **options)


def listen(socket: ClientConnection) -> Received:
    """Until the server closes."""
    messages = []
    try:
        while True:
            messages.append(json.loads(socket.recv(timeout=60)))
    except ConnectionClosed as closed:
        return Received(messages, None if closed.rcvd is None else closed.rcvd.code)


def call(port: int, path: str, messages: Iterable[str | bytes], **options: Any) -> Received:
    """Send all messages, or those before the server closes, and listen."""
    with dial(port, path, **options) as socket:
        with contextlib.suppress(ConnectionClosed):
            for message in messages:
                socket.send(message)
        return listen(socket)


def blocks(data: bytes, size: int) -> list[bytes]:
    return [data[place : place + size] for place in range(0, len(data), size)]
