"""`mal-adapter serve`."""

import logging
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from mal_adapter import demo
from mal_adapter.cli.hosts import device_of, load_recognizer
from mal_adapter.cli.options import Device, Dtype, DtypeOption, Labels, Prompt, json_option, model_option
from mal_adapter.cli.output import load_libraries, print_json, print_line
from mal_adapter.cli.serve_vllm import become_vllm, check_options
from mal_adapter.cli.usage import shown
from mal_adapter.extras import require

__all__ = ["serve"]


class Engine(str, Enum):
    """What answers."""

    embedded = "embedded"
    vllm = "vllm"


_SESSIONS, _ADDRESS, _LIMITS = "Sessions", "Address", "Limits"


@shown(
    "Serve",
    ("The model in the package, on this machine only", "mal-adapter serve"),
    (
        "One of several replicas with a trained memory",
        "mal-adapter serve --adapter my-memory --port 8001 --api-keys keys.txt \\\n"
        "--store redis://host/0 --ttl-s 86400",
    ),
    (
        "A trained memory in vLLM, with a flag of vLLM",
        "mal-adapter serve --engine vllm --adapter my-memory \\\n--store redis://host/0 -- --max-num-seqs 64",
    ),
    (
        "An utterance of the session call-42",
        "curl --data-binary @turn1.wav \\\nlocalhost:8000/sessions/call-42/utterances",
    ),
)
def serve(
    context: typer.Context,
    vllm_flags: Annotated[
        list[str] | None, typer.Argument(metavar="-- VLLM_FLAG", help="Flags of `vllm serve`.")
    ] = None,
    engine: Annotated[
        Engine,
        typer.Option(
            metavar="NAME",
            help="embedded: transformers in this process, for one machine; vllm: `vllm serve`, for many calls.",
            rich_help_panel="Model",
        ),
    ] = Engine.embedded,
    model: Annotated[str | None, model_option("the adapter's; the tiny one in the package without --adapter")] = None,
    adapter: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Folder or Hub id of a trained memory.", rich_help_panel="Model"),
    ] = None,
    labels: Labels = None,
    prompt: Prompt = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER_OR_URL",
            help="Where sessions are kept: a folder, or redis://host/0 (default: in this process, the 1024 used last). "
            "Other users of the machine can't see the variable.",
            envvar="MAL_ADAPTER_STORE",
            show_envvar=True,
            rich_help_panel=_SESSIONS,
        ),
    ] = None,
    ttl_s: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="A session expires after this time without an utterance (default: never).",
            rich_help_panel=_SESSIONS,
        ),
    ] = None,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A line `NAME KEY` or `NAME sha256:DIGEST` per tenant, who uses its own sessions only.",
            rich_help_panel=_SESSIONS,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen.", rich_help_panel=_ADDRESS)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="NUMBER", help="0 chooses a free one.", rich_help_panel=_ADDRESS, min=0, max=65535)
    ] = 8000,
    batch: Annotated[
        int, typer.Option(metavar="NUMBER", help="Utterances in one forward.", rich_help_panel=_LIMITS)
    ] = 8,
    wait_ms: Annotated[
        float,
        typer.Option(
            metavar="MILLISECONDS",
            help="The time that an utterance waits for others, unless the batch is full before.",
            rich_help_panel=_LIMITS,
        ),
    ] = 5.0,
    max_bytes: Annotated[int, typer.Option(metavar="NUMBER", help="Of one body.", rich_help_panel=_LIMITS)] = 10
    * 2**20,
    max_audio_s: Annotated[
        float, typer.Option(metavar="SECONDS", help="Of one utterance.", rich_help_panel=_LIMITS)
    ] = 30.0,
    max_pending: Annotated[
        int, typer.Option(metavar="NUMBER", help="Requests at once, including waiting ones.", rich_help_panel=_LIMITS)
    ] = 64,
    timeout_s: Annotated[
        float, typer.Option(metavar="SECONDS", help="Of the upload and the wait.", rich_help_panel=_LIMITS)
    ] = 30.0,
    drain_s: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="For running requests, after SIGTERM.", rich_help_panel=_LIMITS),
    ] = 30.0,
    max_streams: Annotated[
        int, typer.Option(metavar="NUMBER", help="Live streams at once.", rich_help_panel=_LIMITS)
    ] = 64,
    max_stream_s: Annotated[
        float, typer.Option(metavar="SECONDS", help="Of sound of one live stream.", rich_help_panel=_LIMITS)
    ] = 14400.0,
    max_message_bytes: Annotated[
        int, typer.Option(metavar="NUMBER", help="Of one message of a live stream.", rich_help_panel=_LIMITS)
    ] = 256 * 2**10,
    idle_s: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="A live stream without a message is ended.", rich_help_panel=_LIMITS),
    ] = 60.0,
    as_json: Annotated[bool, json_option("url, model, adapter, store, labels, tenants; at the start")] = False,
) -> None:
    """Answer utterances over HTTP, each in the session of its call.

    Logs are JSON lines on stderr. SIGTERM and Ctrl-C end the server: new requests are refused, running ones are
    answered, and sessions are saved. The exit code is 1 if this was not possible in time.

    With --engine vllm, the command checks that the adapter and the model can be served, and becomes `vllm serve` with
    every flag that a memory needs. The API is then vLLM's own.
    """
    check_options(context, vllm_flags or [], vllm=engine is Engine.vllm)
    if engine is Engine.vllm:
        if adapter is None:
            raise typer.BadParameter("is needed with --engine vllm", param_hint="--adapter")
        become_vllm(model, adapter, store, ttl_s, dtype.value, host, port, vllm_flags or [])
    require("mal-adapter serve", "fastapi", "uvicorn", "websockets", "prometheus_client", extra="serve")
    load_libraries()
    from mal_adapter.server.app import make_app
    from mal_adapter.server.keys import ApiKeys
    from mal_adapter.server.limits import Limits
    from mal_adapter.server.logs import log_as_json
    from mal_adapter.server.start import bind
    from mal_adapter.server.start import serve as run
    from mal_adapter.server.tenant_store import TenantStore
    from mal_adapter.stores import InMemoryStore, open_store

    limits = Limits(
        max_bytes, max_audio_s, max_pending, timeout_s, batch, wait_ms, drain_s, max_streams, max_stream_s,
        max_message_bytes, idle_s,
    )  # fmt: skip
    keys = None if api_keys is None else ApiKeys.read(api_keys)
    if adapter is None and model is not None:
        raise typer.BadParameter("needs an --adapter that was trained for it", param_hint="--model")
    if adapter is None:
        model, adapter = str(demo.HOST_FOLDER), str(demo.ADAPTER_FOLDER)
    listener = bind(host, port)
    if store is not None:
        sessions = open_store(store, ttl_s)
    elif keys is not None:
        sessions = TenantStore(keys.tenants, lambda: InMemoryStore(ttl_s=ttl_s))
    else:
        sessions = InMemoryStore(ttl_s=ttl_s)
    recognizer = load_recognizer(
        model, adapter, labels, prompt, device_of(device), dtype, spread=device == "auto", store=sessions
    )
    assert recognizer.memory is not None

    def started(url: str) -> None:
        answer = {
            "url": url,
            "model": str(recognizer.model.name_or_path),
            "adapter": adapter,
            "store": repr(sessions),
            "labels": list(recognizer.labels),
            "tenants": None if keys is None else list(keys.tenants),
        }
        print_json(answer) if as_json else print_line(f"{url} answers; stop it with Ctrl-C or SIGTERM")
        sys.stdout.flush()

    log_as_json()
    if not run(make_app(recognizer, recognizer.memory, limits, keys), listener, drain_s, started):
        # Threads that hang in the model or the store would keep the process.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(1)
