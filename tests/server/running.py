"""Servers for tests: an application in a thread of this process, or the command in a process of its own."""

import contextlib
import http.client
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn
from fastapi import FastAPI

from tests.stores.servers import free_port, wait_until


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def send(
    port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout_s: float = 60
) -> Reply:
    """Sends a path unchanged, which clients may normalize."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
    finally:
        connection.close()


@contextlib.contextmanager
def in_thread(app: FastAPI) -> Iterator[int]:
    """Yields the port of an application that a thread of this process serves."""
    server = uvicorn.Server(uvicorn.Config(app, port=(port := free_port()), log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join()


class Command:
    """`mal-adapter serve` in a process of its own."""

    def __init__(self, folder: Path, *options: object) -> None:
        self.log = folder / "log"
        command = [sys.executable, "-m", "mal_adapter.cli", "serve", "--port", "0", "--json", *map(str, options)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        self.started: dict[str, Any] = {}

    def wait(self) -> "Command":
        """Until it listens."""
        assert self.process.stdout is not None
        lines: list[str] = []
        while not lines or lines[-1] != "}\n":
            lines.append(self.process.stdout.readline())
            assert lines[-1], self.log.read_text()
        self.started = json.loads("".join(lines))
        self.port = int(self.started["url"].rpartition(":")[2])
        return self

    def lines(self) -> list[dict[str, Any]]:
        """The log."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
