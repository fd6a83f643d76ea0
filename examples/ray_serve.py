"""Replicas of `mal-adapter serve` on one or many machines, behind Ray Serve. Redis keeps the sessions, so that when a
replica dies, another one continues them.

pip install 'mal-adapter[serve,redis]' 'ray[serve]==2.60.*'       # Ray is in no extra: it needs 493 MB
serve run --app-dir examples --working-dir examples ray_serve:replicas store=redis://:password@host/0 replicas=2
curl -H 'x-session-id: call-42' --data-binary @turn1.wav localhost:8000/sessions/call-42/utterances

Each session is processed by one replica while the header `x-session-id` has its id, in all requests of the session.
"""

from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve
from ray.serve.config import RequestRouterConfig
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mal_adapter.demo import ADAPTER_FOLDER
from mal_adapter.ser import EmotionRecognizer
from mal_adapter.server import Limits, make_app
from mal_adapter.server.flush import FLUSH_S
from mal_adapter.server.logs import log_as_json
from mal_adapter.stores import open_store

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class Options(BaseModel):
    """`serve run … NAME=VALUE`, or `args` in a file for `serve deploy`. A name of a model may be a folder or a Hub id;
    every machine needs the folder."""

    store: str
    """As `mal-adapter serve --store`: Redis; or a folder, if all replicas are on one machine."""
    ttl_s: float | None = None
    adapter: str = str(ADAPTER_FOLDER)
    model: str | None = None  # the adapter's
    replicas: int = 2
    cpus: float = 1  # of each replica, by which Ray chooses its machine
    gpus: float = 0


class ReplicaHeader:
    """Middleware: `x-replica` of an answer names the replica that gave it."""

    def __init__(self, app: ASGIApp, replica: str) -> None:
        self._app = app
        self._replica = replica

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-replica"] = self._replica
            await send(message)

        await self._app(scope, receive, sending)


def replicas(options: Options) -> serve.Application:
    """The application for Ray Serve."""
    limits = Limits()

    def make() -> FastAPI:  # in each replica
        log_as_json()
        store = open_store(options.store, options.ttl_s)
        recognizer = EmotionRecognizer.from_pretrained(options.adapter, options.model, store=store)
        assert recognizer.memory is not None
        app = make_app(recognizer, recognizer.memory, limits)
        app.add_middleware(ReplicaHeader, replica=serve.get_replica_context().replica_id.unique_id)
        return app

    deployment = serve.deployment(
        serve.ingress(make)(),
        name="mal_adapter",
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        # A full replica answers 503 itself. If Ray counted fewer (5 unless given), it would send sessions elsewhere.
        max_ongoing_requests=2 * limits.max_pending,
        graceful_shutdown_timeout_s=limits.drain_s + FLUSH_S,
    )
    return deployment.bind()
