"""`serve`: one process that listens until SIGTERM."""

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from types import FrameType

import torch
import uvicorn
from fastapi import FastAPI

from mal_adapter.errors import ConfigError
from mal_adapter.server.drain import Drain

__all__ = ["bind", "serve"]

log = logging.getLogger(__name__)


def bind(host: str, port: int) -> socket.socket:
    """Take an address, before a model is loaded. Connections are refused until `serve` listens there.

    Args:
        host: A name or an address.
        port: 0 chooses a free one.

    Raises:
        ConfigError: The address is not of this machine, or is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for old connections
        listener.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"can't listen at {host}:{port}: {reason}; choose another --host or --port") from error
    return listener


def serve(app: FastAPI, listener: socket.socket, drain_s: float, started: Callable[[str], None]) -> bool:
    """Answer requests until SIGTERM or SIGINT. Then new requests are refused, running ones end, and states are saved.
    A second signal drops the running requests.

    Args:
        app: From `make_app`.
        listener: From `bind`.
        drain_s: Seconds that running requests have after the signal.
        started: Called with the server's URL as soon as it listens.

    Returns:
        Whether all requests ended in time, and all states are saved. If not, threads may still be running.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,
        ws_max_size=app.state.max_message_bytes,
        ws_ping_timeout=60.0,  # a client that is not read for a while, since it is ahead, can't answer a ping
        ws_per_message_deflate=False,  # sound does not get smaller
    )
    logging.getLogger("uvicorn.error").addFilter(_has_no_path)
    server = _Server(config, app.state.drain)
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def run() -> bool:
        ending = asyncio.create_task(_end(server, drain_s, lambda: started(url)))
        await server.serve(sockets=[listener])
        ending.cancel()  # it still waits for requests if there was a second signal
        await asyncio.wait([ending])
        return not ending.cancelled() and ending.result() and not server.dropped

    # A batch's prompts are short: waking threads for them takes longer than their tokens.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _keep_freed_memory()
    ended = asyncio.run(run())
    return ended and bool(app.state.flushed)


def _keep_freed_memory() -> None:
    """glibc returns large blocks to the system until one of nearly 32 MiB was freed. Without this, a batch's spectra
    would be in pages that are new each time, which costs a sixth of the answer of a small host."""
    block = torch.ones((32 << 20) // 4 - 4096)
    del block


def _has_no_path(record: logging.LogRecord) -> bool:
    """Whether a line of uvicorn has no path of a WebSocket, which may name a person or have a query."""
    return '"WebSocket ' not in str(record.msg)


class _Server(uvicorn.Server):
    """uvicorn, where a signal begins a drain; uvicorn itself would refuse connections at once and then exit by the
    signal."""

    def __init__(self, config: uvicorn.Config, drain: Drain) -> None:
        super().__init__(config)
        self.drain = drain
        self.dropped = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.drain.began:
            self.should_exit, self.dropped = True, self.drain.running > 0
        self.drain.begin()


async def _end(server: _Server, drain_s: float, started: Callable[[], None]) -> bool:
    """Stop the server some time after its drain has begun. Returns whether all requests had ended."""
    while not server.started:
        await asyncio.sleep(0.01)
    started()
    while not server.drain.began and not server.should_exit:
        await asyncio.sleep(0.05)
    log.info("no new requests; %d are running", server.drain.running)
    ended = await server.drain.wait(drain_s)
    if not ended:
        log.error("%d requests have not ended in %g s and are dropped", server.drain.running, drain_s)
    server.should_exit = True
    return ended
