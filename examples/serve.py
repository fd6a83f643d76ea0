"""Emotions over HTTP: each POST is one utterance of a call, heard with the call so far in memory.

pip install 'mal-adapter[serve]'
python examples/serve.py                                       # the tiny host of the package, sessions in this process
python examples/serve.py --store redis://:password@host/0      # or a folder: sessions that outlive the process
python examples/serve.py --model Qwen/Qwen2-Audio-7B-Instruct --adapter user/their-memory

curl --data-binary @turn1.wav localhost:8000/sessions/call-42/utterances
"""

import argparse
import asyncio
import contextvars
import itertools
import logging
import math
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated, Any
from weakref import WeakValueDictionary

import fastapi
import soundfile
import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mal_adapter import AttachedMemory, MemoryState, attach_memory, errors
from mal_adapter.demo import ADAPTER_FOLDER, EMOTIONS, HOST_FOLDER, PROMPT
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer, Failure
from mal_adapter.stores import InMemoryStore, SessionStore, open_store

log = logging.getLogger("uvicorn.error")
SessionId = Annotated[str, fastapi.Path(pattern="^[A-Za-z0-9._~-]{1,64}$")]
RETRY = {"Retry-After": "1"}  # seconds


class RefusedError(Exception):
    """An answer that is an error: its HTTP status, a word for programs, a sentence for people, and headers."""

    def __init__(self, status: int, error: str, message: str, headers: dict[str, str] | None = None) -> None:
        self.response = JSONResponse({"error": error, "message": message}, status, headers)


#: What the sender is told; an error's own words name folders and hosts, and are for the log.
TOLD: dict[type[Exception], tuple[Any, ...]] = {
    errors.SessionConflictError: (409, "conflict", "another replica has continued this session; send it again"),
    errors.StoreError: (503, "store_unreachable", "sessions can't be read or kept now; try again", RETRY),
    errors.StateFormatError: (409, "unusable_session", "the session's state is damaged; delete the session"),
    errors.StateMismatchError: (409, "unusable_session", "another adapter has heard this session; delete it"),
}


class AbandonedError(Exception):
    """The sender of this utterance has been told that it came too late."""


class Attempt:
    """One utterance on its way into the memory: it lands there, or its sender is told that it did not; never both."""

    def __init__(self) -> None:
        self.utterances = 0
        self.lands: bool | None = None
        self._lock = threading.Lock()

    def settle(self, lands: bool) -> bool:
        """Decide whether it lands, unless that is decided; returns what is."""
        with self._lock:
            self.lands = lands if self.lands is None else self.lands
            return self.lands


attempt_under_way: contextvars.ContextVar[Attempt | None] = contextvars.ContextVar("attempt_under_way", default=None)


class AttemptStore:
    """A store in which no abandoned utterance lands. A thread can't be stopped, but what raises writes nothing."""

    def __init__(self, store: SessionStore) -> None:
        self.get, self.drop, self._put, self._iter = store.get, store.drop, store.put, store.__iter__

    def put(self, session_id: str, state: MemoryState, version: str | None = None) -> str:
        if (attempt := attempt_under_way.get()) is not None:
            if not attempt.settle(True):
                raise AbandonedError
            attempt.utterances = int(state.utterances)
        return self._put(session_id, state, version)

    def __iter__(self) -> Iterator[str]:
        return self._iter()


class Service:
    """The sessions of one recogniser. Utterances of a session are heard in the order in which their requests begin."""

    def __init__(self, recognizer: EmotionRecognizer, memory: AttachedMemory, limits: argparse.Namespace) -> None:
        self.recognizer, self.states, self.limits = recognizer, memory.states, limits
        self.pending = 0  # requests
        self.tasks: set[asyncio.Task[Any]] = set()
        self.folder = Path()  # of bodies, while the server runs
        self._numbers = itertools.count()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # gone when nobody waits

    async def hear(self, session_id: str, request: Request) -> dict[str, Any]:
        """Take one utterance's file and answer. Unless this returns, the session is as it was."""
        deadline = time.monotonic() + self.limits.timeout_s
        attempt, path = Attempt(), self.folder / str(next(self._numbers))
        async with AsyncExitStack() as held:
            held.enter_context(self._place())
            await self._turn(held, session_id, deadline)
            held.callback(path.unlink, missing_ok=True)
            slow = RefusedError(408, "slow_upload", f"the audio did not arrive within {self.limits.timeout_s:g} s")
            await within(deadline, self._save(request, path), slow)
            # From here on the end of the thread, not the sender's patience, frees the session and the place.
            task = asyncio.create_task(self._in_thread(held.pop_all(), session_id, path, attempt))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be listening any more
        done, _ = await asyncio.wait({task}, timeout=deadline - time.monotonic())
        if not done and not attempt.settle(False):
            raise self._late()
        return await task

    async def drop(self, session_id: str) -> None:
        """Forget a session, after its utterances that are under way. Raises KeyError if there is none."""
        async with AsyncExitStack() as held:
            held.enter_context(self._place())
            await self._turn(held, session_id, time.monotonic() + self.limits.timeout_s)
            await run_in_threadpool(self.states.__delitem__, session_id)

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self.pending >= self.limits.max_pending:
            raise RefusedError(503, "overloaded", f"{self.pending} requests are under way; try again", RETRY)
        self.pending += 1
        try:
            yield
        finally:
            self.pending -= 1

    async def _turn(self, held: AsyncExitStack, session_id: str, deadline: float) -> None:
        lock = self._locks.setdefault(session_id, asyncio.Lock())
        await within(deadline, held.enter_async_context(lock), self._late())

    def _late(self) -> RefusedError:
        message = f"no answer within {self.limits.timeout_s:g} s; the session is as it was, send the utterance again"
        return RefusedError(504, "timeout", message, RETRY)

    async def _save(self, request: Request, path: Path) -> None:
        limit, size = self.limits.max_bytes, 0
        large = RefusedError(413, "too_large", f"the body has more than {limit} bytes", {"Connection": "close"})
        if int(request.headers.get("content-length", 0)) > limit:
            raise large
        with path.open("wb") as file:
            async for part in request.stream():
                if (size := size + len(part)) > limit:
                    raise large
                file.write(part)
        if size == 0:
            raise RefusedError(422, "bad_audio", "the body is empty; send a sound file: curl --data-binary @turn.wav")

    async def _in_thread(self, held: AsyncExitStack, session_id: str, path: Path, attempt: Attempt) -> dict[str, Any]:
        async with held:
            return await asyncio.to_thread(self._answer, session_id, path, attempt)

    def _answer(self, session_id: str, path: Path, attempt: Attempt) -> dict[str, Any]:
        if attempt.lands is False:
            raise AbandonedError
        attempt_under_way.set(attempt)  # to_thread has copied the context: no other utterance sees it
        check_duration(path, self.limits.max_audio_s)
        (result,) = self.recognizer.answer([Utterance(session_id, "0", "?", path)])
        if isinstance(result, Failure):
            error = "audio_too_long" if isinstance(result.error, errors.AudioTooLongError) else "bad_audio"
            raise RefusedError(422, error, str(result.error).removeprefix(f"{path}: "))
        return {
            "session": session_id,
            "utterance": attempt.utterances,
            "emotion": result.label,
            "probabilities": result.probabilities,
            "audio_s": result.audio_s,
            "elapsed_s": result.elapsed_s,
            "saved": session_id not in self.states.unsaved,
        }


async def within(deadline: float, awaitable: Awaitable[Any], late: RefusedError) -> None:
    try:
        await asyncio.wait_for(awaitable, deadline - time.monotonic())
    except asyncio.TimeoutError:
        raise late from None


def check_duration(path: Path, max_audio_s: float) -> None:
    """Before anything is decoded, since few bytes can unpack to hours, or to hundreds of channels."""
    try:
        info = soundfile.info(str(path))
    except soundfile.LibsndfileError:
        raise RefusedError(415, "unknown_format", "this is no sound file; send WAV, FLAC, OGG or MP3") from None
    if info.duration > max_audio_s or info.frames * info.channels > max_audio_s * 2 * 48_000:
        raise RefusedError(422, "audio_too_long", f"{info.duration:.2f} s of audio; up to {max_audio_s:g} s are heard")


def refused(error: Exception) -> JSONResponse:
    log.warning("%s: %s", type(error).__name__, error)
    told = next((told for kind, told in TOLD.items() if isinstance(error, kind)), (500, "internal", "see the log"))
    return RefusedError(*told).response


def make_app(service: Service, threads: int) -> FastAPI:
    states = service.states

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(threads, "hearing"))
        with tempfile.TemporaryDirectory(prefix="utterances-") as folder:
            service.folder = Path(folder)
            yield
            await asyncio.gather(*service.tasks, return_exceptions=True)
        try:
            await run_in_threadpool(states.flush)
        except errors.MalAdapterError as error:
            log.error("the sessions %s are lost: %s", states.unsaved, error)

    app = FastAPI(title="Emotions of spoken dialogues", lifespan=lifespan)
    unknown = (404, "unknown_session", "there is no such session, or none any more")

    @app.post("/sessions/{session_id:path}/utterances")
    async def hear(session_id: SessionId, request: Request) -> dict[str, Any]:
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise RefusedError(415, "unknown_format", "send the file itself as the body: curl --data-binary @turn.wav")
        return await service.hear(session_id, request)

    @app.get("/sessions/{session_id:path}")
    def look(session_id: SessionId) -> dict[str, Any]:
        if (state := states.get(session_id)) is None:
            raise RefusedError(*unknown)
        counters = {name: int(getattr(state, name)) for name in ("utterances", "tokens", "skipped_writes")}
        return {"session": session_id, **counters, "saved": session_id not in states.unsaved}

    @app.delete("/sessions/{session_id:path}", status_code=204)
    async def drop(session_id: SessionId) -> None:
        try:
            await service.drop(session_id)
        except KeyError:
            raise RefusedError(*unknown) from None

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "alive", "pending": service.pending, "unsaved": len(states.unsaved)}

    @app.get("/ready")
    def ready() -> dict[str, str]:
        states.store.get("?")  # no session has this id; raises where the store can't be reached
        return {"status": "ready"}

    bad_id = RefusedError(400, "bad_session_id", "a session id is 1 to 64 of the characters A-Z a-z 0-9 . _ ~ -")
    app.exception_handler(RequestValidationError)(lambda _, error: bad_id.response)  # nothing else is validated
    app.exception_handler(RefusedError)(lambda _, error: error.response)
    app.exception_handler(errors.MalAdapterError)(lambda _, error: refused(error))
    app.exception_handler(HTTPException)(lambda _, e: RefusedError(e.status_code, "no_route", e.detail).response)
    app.exception_handler(ClientDisconnect)(lambda _, error: JSONResponse(None, 400))  # nobody is there to read it
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HOST_FOLDER), help="folder or Hub id (default: the package's tiny host)")
    parser.add_argument("--adapter", help="folder or Hub id of a memory trained for that model")
    parser.add_argument("--store", help="folder or redis:// URL of the sessions (default: in this process)")
    parser.add_argument("--ttl-s", type=float, help="a session is forgotten after so many seconds without an utterance")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-bytes", type=int, default=10 * 2**20, help="of one body (default: %(default)s)")
    parser.add_argument("--max-audio-s", type=float, default=30.0, help="of one utterance (default: %(default)s)")
    parser.add_argument("--max-pending", type=int, default=64, help="requests at once (default: %(default)s)")
    parser.add_argument("--timeout-s", type=float, default=30.0, help="of one request (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="that hear; a second one decodes for a busy GPU")
    options = parser.parse_args()
    if options.adapter is None and options.model != str(HOST_FOLDER):
        parser.error("--model needs an --adapter that was trained for it")
    model, processor = load_host(options.model)
    store = InMemoryStore(ttl_s=options.ttl_s) if options.store is None else open_store(options.store, options.ttl_s)
    memory = attach_memory(model, adapter=options.adapter or ADAPTER_FOLDER, store=AttemptStore(store))
    task = memory.adapter.card.task or {"labels": EMOTIONS, "prompt": PROMPT}
    recognizer = EmotionRecognizer(model, processor, memory, task["labels"], task["prompt"])
    app = make_app(Service(recognizer, memory, options), options.threads)
    uvicorn.run(app, host=options.host, port=options.port, timeout_graceful_shutdown=math.ceil(options.timeout_s))


if __name__ == "__main__":
    main()
