"""Emotions over HTTP: each POST is one utterance of a call, answered with the call so far in memory.

pip install 'mal-adapter[serve]'                               # 'mal-adapter[serve,redis]' for replicas
python examples/serve.py                                       # the tiny host of the package, sessions in this process
python examples/serve.py --store redis://:password@host/0      # or a folder: sessions survive a restart
python examples/serve.py --model Qwen/Qwen2-Audio-7B-Instruct --adapter user/their-memory

curl --data-binary @turn1.wav localhost:8000/sessions/call-42/utterances
"""

import argparse
import asyncio
import logging
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import anyio
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.requests import ClientDisconnect

from mal_adapter import AttachedMemory, attach_memory, errors
from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer, Failure
from mal_adapter.ser.recognizer.audio import sound_info
from mal_adapter.stores import InMemoryStore, open_store

log = logging.getLogger("uvicorn.error")
AGAIN = {"Retry-After": "1"}  # seconds

#: The client's answer to each error. The error's own message may name folders and hosts, so it goes to the log only.
REPLIES: dict[type[Exception], tuple[int, str, dict[str, str] | None]] = {
    errors.SessionError: (400, "this is not a valid session id; use a short name of letters, digits, - and /", None),
    errors.SessionConflictError: (409, "another replica has continued this session; send the utterance again", None),
    errors.StoreError: (503, "sessions can't be read or saved now; send it again", AGAIN),
    errors.MalAdapterError: (500, "this session can't continue, see the server's log; delete it to start again", None),
}


def make_app(recognizer: EmotionRecognizer, memory: AttachedMemory, limits: argparse.Namespace) -> FastAPI:
    """Routes to the sessions of one recogniser. A session changes only if its utterance is answered."""
    states = memory.states
    host = asyncio.Lock()  # one forward at a time
    locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # of sessions that requests use
    waiting: set[Request] = set()

    @asynccontextmanager
    async def turn(session_id: str, request: Request) -> AsyncIterator[None]:
        """Lock a session, for its requests in the order in which they begin."""
        if len(waiting) >= limits.max_pending:
            raise HTTPException(503, f"{len(waiting)} requests are under way; send it again later", AGAIN)
        waiting.add(request)
        try:
            async with locks.setdefault(session_id, asyncio.Lock()):
                yield
        finally:
            waiting.remove(request)

    @contextmanager
    def in_time() -> Iterator[None]:
        try:
            with anyio.fail_after(limits.timeout_s):
                yield
        except TimeoutError:
            reason = f"the upload and the wait took more than {limits.timeout_s:g} s; send it again"
            raise HTTPException(503, reason, {**AGAIN, "Connection": "close"}) from None

    def answer(session_id: str, body: bytes) -> dict[str, Any]:
        if not body:
            raise no_sound_file(0)
        before = states.get(session_id)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "utterance")
            path.write_bytes(body)
            check_size(path, limits.max_audio_s)
            (result,) = recognizer.answer([Utterance(session_id, "0", "?", path)])
        if isinstance(result, Failure):
            raise HTTPException(422, str(result.error).removeprefix(f"{path}: "))
        return {
            "session": session_id,
            "utterance": 1 if before is None else 1 + int(before.utterances),
            "emotion": result.label,
            "probabilities": result.probabilities,
            "audio_s": result.audio_s,
            "elapsed_s": result.elapsed_s,
            "saved": session_id not in states.unsaved,
        }

    def flush() -> None:
        while True:
            try:
                return states.flush()
            except errors.SessionConflictError as error:  # of one session; continue with the others
                log.error("another replica has continued a session, and the state of this replica is lost: %s", error)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        try:
            await run_in_threadpool(flush)
        except errors.MalAdapterError as error:
            log.error("the last utterances of the sessions %s are lost: %s", states.unsaved, error)

    # An id may end in a slash, so paths are not redirected to ones with or without it.
    app = FastAPI(title="Emotions of spoken dialogues", lifespan=lifespan, redirect_slashes=False)

    # An id may have slashes. An ASGI server decodes %2F before the path is matched.
    @app.post("/sessions/{session_id:text}/utterances")
    async def post_utterance(session_id: str, request: Request) -> dict[str, Any]:
        """The body is a sound file."""
        check_id(session_id)
        async with AsyncExitStack() as held:
            with in_time():
                await held.enter_async_context(turn(session_id, request))
                body = await read(request, limits.max_bytes)
                await held.enter_async_context(host)
            if await request.is_disconnected():  # it may send the utterance again, which must not be processed twice
                raise ClientDisconnect
            return await run_in_threadpool(answer, session_id, body)

    @app.get("/sessions/{session_id:text}")
    def get_session(session_id: str) -> dict[str, Any]:
        check_id(session_id)
        if (state := states.get(session_id)) is None:
            raise HTTPException(404, "this session does not exist or has expired")
        counters = {name: int(getattr(state, name)) for name in ("utterances", "tokens", "skipped_writes")}
        return {"session": session_id, **counters, "saved": session_id not in states.unsaved}

    @app.delete("/sessions/{session_id:text}", status_code=204)
    async def delete_session(session_id: str, request: Request) -> None:
        check_id(session_id)
        async with AsyncExitStack() as held:
            with in_time():
                await held.enter_async_context(turn(session_id, request))
            try:
                await run_in_threadpool(states.__delitem__, session_id)
            except KeyError:
                raise HTTPException(404, "this session does not exist or has expired") from None

    @app.get("/health")
    async def health() -> dict[str, Any]:
        outage = states.outage
        waits = None if outage is None else {"since_s": round(outage.for_s), "next_try_s": round(outage.next_try_s, 1)}
        counts = {"pending": len(waiting), "unsaved": 0 if outage is None else outage.sessions, "outage": waits}
        return {"status": "alive", **counts, "lost": states.backlog.lost}

    @app.get("/ready")
    def ready() -> dict[str, str]:
        states.store.get("?")  # raises where the store can't be reached
        if states.backlog.full():
            raise HTTPException(503, "the store can't save sessions, and this process has no room for more", AGAIN)
        return {"status": "ready"}

    @app.exception_handler(errors.MalAdapterError)
    def refuse(_: Request, error: errors.MalAdapterError) -> JSONResponse:
        log.warning("%s: %s", type(error).__name__, error)
        status, detail, headers = next(reply for kind, reply in REPLIES.items() if isinstance(error, kind))
        return JSONResponse({"detail": detail}, status, headers)

    app.exception_handler(ClientDisconnect)(lambda *_: JSONResponse(None, 400))  # the client has disconnected
    return app


class Text(PathConvertor):
    """Any text within a path: slashes, as in `path`, and the ends of lines too."""

    regex = "(?s:.*)"


register_url_convertor("text", Text())


def check_id(session_id: str) -> None:
    """Raise `SessionError`, which is answered 400, unless the id is valid."""
    # All bytes that are not UTF-8 are decoded to U+FFFD: different ids would become one session.
    if not session_id or "\ufffd" in session_id or "\0" in session_id:
        raise errors.SessionError(f"session id {session_id!r} is empty, not UTF-8, or has a null character")


async def read(request: Request, max_bytes: int) -> bytes:
    """Read the body, up to `max_bytes`."""
    too_large = HTTPException(413, f"the body has more than {max_bytes} bytes", {"Connection": "close"})
    if int(request.headers.get("content-length", 0)) > max_bytes:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def no_sound_file(size: int) -> HTTPException:
    """The answer to a body that is not a sound file."""
    advice = "send the file itself, WAV, FLAC, OGG or MP3, as curl --data-binary @turn.wav does"
    return HTTPException(415, f"these {size} bytes are not a sound file; {advice}")


def check_size(path: Path, max_audio_s: float) -> None:
    """Refuse a file that is too long, or not a sound file, before it is decoded: few bytes can unpack to hours, or to
    hundreds of channels. `sound_info` measures the content, whatever the header declares."""
    try:
        info = sound_info(path)
    except errors.AudioFormatError:
        raise no_sound_file(path.stat().st_size) from None
    except errors.AudioError as error:
        raise HTTPException(422, str(error).removeprefix(f"{path}: ")) from None
    samples = info.duration_s * info.sampling_rate * info.channels
    if info.duration_s > max_audio_s or samples > max_audio_s * 2 * 48_000:
        raise HTTPException(422, f"{info.duration_s:.2f} s of audio; up to {max_audio_s:g} s in stereo are processed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HOST_FOLDER), help="folder or Hub id (default: the package's tiny host)")
    parser.add_argument("--adapter", help="folder or Hub id of a memory trained for that model")
    parser.add_argument("--store", help="folder or redis:// URL of the sessions (default: in this process)")
    parser.add_argument("--ttl-s", type=float, help="seconds without an utterance after which a session expires")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-bytes", type=int, default=10 * 2**20, help="of one body (default: %(default)s)")
    parser.add_argument("--max-audio-s", type=float, default=30.0, help="of one utterance (default: %(default)s)")
    parser.add_argument("--max-pending", type=int, default=64, help="requests at once (default: %(default)s)")
    parser.add_argument(
        "--timeout-s", type=float, default=30.0, help="of the upload and the wait (default: %(default)s)"
    )
    options = parser.parse_args()
    if options.adapter is None and options.model != str(HOST_FOLDER):
        parser.error("--model needs an --adapter that was trained for it")
    model, processor = load_host(options.model)
    store = InMemoryStore(ttl_s=options.ttl_s) if options.store is None else open_store(options.store, options.ttl_s)
    memory = attach_memory(model, adapter=options.adapter or ADAPTER_FOLDER, store=store)
    recognizer = EmotionRecognizer(model, processor, memory)
    uvicorn.run(make_app(recognizer, memory, options), host=options.host, port=options.port)


if __name__ == "__main__":
    main()
